//! Reads a server's address as libpq would: one server, or several of which one takes writes.

use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;
use url::Url;

use crate::ledger::LedgerError;

/// What an address should look like.
const SHAPE: &str = "it must look like postgres://user:password@host:5432/database";
/// The parameters that are obeyed, but for `target_session_attrs`.
const KNOWN: [&str; 22] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
    "statement-cache-capacity",
    "host",
    "hostaddr",
    "port",
    "dbname",
    "user",
    "password",
    "application_name",
    "options",
    // Obeyed by what this ledger does anyway: limits of its own, keep-alives, and the libraries' choices.
    "connect_timeout",
    "keepalives",
    "gssencmode",
    "channel_binding",
];
/// Those of them that only libpq needs to be told.
const IMPLIED: [&str; 4] = ["connect_timeout", "keepalives", "gssencmode", "channel_binding"];
/// The parameters that say where a server is.
const PLACES: [&str; 3] = ["host", "hostaddr", "port"];

/// The servers of an address, in its order.
///
/// # Errors
/// [`LedgerError::Address`], whose text never holds the address's password.
pub(super) fn servers(url: &str) -> Result<Vec<PgConnectOptions>, LedgerError> {
    let mut servers = Vec::new();
    for url in authorities(url)? {
        // The parser's own words could quote the password.
        let url = Url::parse(&url).map_err(|error| LedgerError::Address(format!("{SHAPE}: {error}")))?;
        for url in places(&url)? {
            servers.push(server(&url)?);
        }
    }
    Ok(servers)
}

fn server(url: &Url) -> Result<PgConnectOptions, LedgerError> {
    let options: PgConnectOptions = url.as_str().parse().map_err(|error: sqlx::Error| {
        let said = error.to_string();
        LedgerError::Address(match url.password() {
            Some(password) if said.contains(password) => SHAPE.to_owned(),
            _ => said,
        })
    })?;
    // What a pooler may refuse as a startup parameter is set afterwards: see `session`.
    let options = options.extra_float_digits(None).disable_statement_logging();
    Ok(match options.get_application_name() {
        Some(_) => options,
        None => options.application_name("tasklane"),
    })
}

/// The address of each of several servers that stand side by side: `user@one:5432,two:5432/database`.
fn authorities(url: &str) -> Result<Vec<String>, LedgerError> {
    let (scheme, rest) = url.split_once("://").ok_or_else(|| LedgerError::Address(SHAPE.to_owned()))?;
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (user, hosts) = match authority.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), authority),
    };
    let several = hosts.contains(',');
    if several && hosts.split(',').any(str::is_empty) {
        return Err(LedgerError::Address("one of its hosts has no name".to_owned()));
    }
    Ok(hosts.split(',').map(|host| format!("{scheme}://{user}{host}{path}")).collect())
}

/// The address of each of several servers that parameters name: `?host=one,two&port=5432,5433`. Without the parameters
/// that are obeyed here.
fn places(url: &Url) -> Result<Vec<Url>, LedgerError> {
    let (mut kept, mut places) = (Vec::new(), Vec::new());
    for (key, value) in url.query_pairs() {
        match &*key {
            "target_session_attrs" => takes_writes(&value)?,
            key if PLACES.contains(&key) => places.push((key.to_owned(), value.into_owned())),
            key if IMPLIED.contains(&key) => {}
            key if KNOWN.contains(&key) || key.starts_with("options[") => {
                kept.push((key.to_owned(), value.into_owned()))
            }
            // Its value may be a secret.
            unknown => {
                tracing::warn!(parameter = unknown, "ledger_url has a parameter that is not known, and is ignored")
            }
        }
    }
    let several = places.iter().map(|(_, value)| value.split(',').count()).max().unwrap_or(1);
    let mut urls = Vec::new();
    for index in 0..several {
        let mut one = url.clone();
        one.set_query(None);
        for (key, value) in kept.iter().chain(&places) {
            let parts: Vec<&str> =
                if PLACES.contains(&key.as_str()) { value.split(',').collect() } else { vec![value] };
            // As libpq has it: one port is that of all hosts.
            let Some(part) = parts.get(index).or_else(|| parts.first().filter(|_| parts.len() == 1)) else {
                return Err(LedgerError::Address(format!("{key} names {} of {several} servers", parts.len())));
            };
            one.query_pairs_mut().append_pair(key, part);
        }
        urls.push(one);
    }
    Ok(urls)
}

/// A ledger is written to, so a server that takes no writes is passed over whatever this says.
fn takes_writes(wanted: &str) -> Result<(), LedgerError> {
    match wanted {
        "any" | "read-write" | "primary" => Ok(()),
        other => Err(LedgerError::Address(format!(
            "target_session_attrs={other} does not find a server that takes writes: read-write does, which is also the default"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(url: &str) -> Vec<(String, u16)> {
        let servers = servers(url).unwrap();
        servers.iter().map(|server| (server.get_host().to_owned(), server.get_port())).collect()
    }

    fn places(expected: &[(&str, u16)]) -> Vec<(String, u16)> {
        expected.iter().map(|(host, port)| ((*host).to_owned(), *port)).collect()
    }

    #[test]
    fn a_bad_address_is_explained_without_its_password() {
        for url in [
            "postgres://u:secret@h:port/db",
            "postgres://u:secret@h/db?sslmode=secret",
            "postgres://u:secret@[/db",
            "postgres://u:secret@h/db?port=none",
            "postgres://u:secret@h,/db",
            "postgres://u:secret@h/db?host=a,b&port=1,2,3",
            "postgres://u:secret@h/db?target_session_attrs=standby",
        ] {
            let error = servers(url).unwrap_err();
            assert!(matches!(error, LedgerError::Address(_)), "{error}");
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }

    #[test]
    fn an_address_may_name_several_servers() {
        assert_eq!(found("postgres://u:p@h:5433/db?sslmode=require"), places(&[("h", 5433)]));
        let several = places(&[("one", 5433), ("2001:db8::1", 5432), ("three", 5432)]);
        let url = "postgres://u:p%40,@one:5433,[2001:db8::1],three/db?target_session_attrs=read-write&sslmode=require";
        let hosts: Vec<_> = found(url).into_iter().map(|(host, port)| (host.replace(['[', ']'], ""), port)).collect();
        assert_eq!(hosts, several);
        assert_eq!(found("postgres:///db?user=u&host=one,two&port=5433,5434"), places(&[("one", 5433), ("two", 5434)]));
        assert_eq!(found("postgres://u@h/db?host=one,two&port=5433"), places(&[("one", 5433), ("two", 5433)]));
        for server in servers("postgres://u@one,two/db?target_session_attrs=any&strange=1").unwrap() {
            assert_eq!((server.get_username(), server.get_database()), ("u", Some("db")));
        }
    }
}
