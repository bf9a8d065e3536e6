//! Where the broker is: `amqp_url`, read once and strictly.
//!
//! The AMQP library's own reader takes an IPv6 address for no host at all, and the rest of a password for a virtual host.
//! No error here holds a piece of the address beyond scheme and parameter names: any other may be one of the password.

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use lapin::tcp::OwnedIdentity;
use lapin::uri::{AMQPAuthority, AMQPQueryString, AMQPScheme, AMQPUri, AMQPUserInfo, SASLMechanism};
use secrecy::{ExposeSecret, SecretString};
use url::{Host, Url};

use super::RPC_TIMEOUT;

/// The largest frame, to which larger bodies are cut: lapin keeps room for 64 of them a connection, which at the
/// broker's 128 KiB would be 8 MiB.
const FRAME_BYTES_MAX: u32 = 32 * 1024;
/// What `frame_max` may be: AMQP's smallest, and 64 of the largest are 64 MiB.
const FRAME_BYTES_ALLOWED: std::ops::RangeInclusive<u64> = 4096..=1024 * 1024;
/// What else the address may have behind its question mark.
const PARAMETERS: &str =
    "auth_mechanism, cacertfile, certfile, channel_max, connection_timeout, frame_max, heartbeat, keyfile";
const MUST_BE: &str = "must be an address such as amqp://user:password@host:5672/%2f";
const ENCODE: &str = "percent-encode: in user, password and virtual host write / as %2f, @ as %40, : as %3a, ? as %3f, # as %23 and % as %25";

/// The way to a broker, and who comes.
#[derive(Clone)]
pub struct Address {
    scheme: AMQPScheme,
    host: String,
    port: u16,
    user: String,
    password: SecretString,
    vhost: String,
    query: AMQPQueryString,
    /// PEM files: whom to trust besides the system's authorities, and how to prove who comes.
    cacertfile: Option<PathBuf>,
    certfile: Option<PathBuf>,
    keyfile: Option<PathBuf>,
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Address").field(&self.to_string()).finish()
    }
}

/// For people, without the password.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        write!(f, "{host}:{}, user {}, virtual host {}", self.port, self.user, self.vhost)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let scheme = match text.split_once("://").map(|(scheme, _)| scheme.to_ascii_lowercase()).as_deref() {
            Some("amqp") => AMQPScheme::AMQP,
            Some("amqps") => AMQPScheme::AMQPS,
            _ => return Err(MUST_BE.to_owned()),
        };
        let url = Url::parse(text).map_err(|error| format!("{MUST_BE}; {error}; {ENCODE}"))?;
        // Behind the host nothing has an @: it belonged before it, with what stands between.
        let behind = [Some(url.path()), url.query(), url.fragment()];
        if url.fragment().is_some() || behind.into_iter().flatten().any(|part| part.contains('@')) {
            return Err(format!("{MUST_BE}; {ENCODE}"));
        }
        let host = match url.host() {
            Some(Host::Domain(name)) if !name.is_empty() => decode(name)?,
            Some(Host::Ipv4(addr)) => addr.to_string(),
            Some(Host::Ipv6(addr)) => addr.to_string(),
            _ => return Err(format!("{MUST_BE}: it names no host")),
        };
        let port = match url.port() {
            Some(0) => return Err(format!("{MUST_BE}: there is no port 0")),
            Some(port) => port,
            None => scheme.default_port(),
        };
        let AMQPUserInfo { username, password } = AMQPUserInfo::default();
        let user = if url.username().is_empty() { username } else { decode(url.username())? };
        let password = url.password().map_or(Ok(password), decode)?.into();
        let vhost = match url.path().strip_prefix('/').unwrap_or_default() {
            // RabbitMQ has no virtual host without a name.
            "" => "/".to_owned(),
            path if path.contains('/') => return Err(format!("{MUST_BE}; {ENCODE}")),
            path => decode(path)?,
        };
        let query = AMQPQueryString::default();
        let mut address =
            Self { scheme, host, port, user, password, vhost, query, cacertfile: None, certfile: None, keyfile: None };
        for (name, value) in url.query_pairs() {
            address.set(&name, &value)?;
        }
        if address.certfile.is_some() != address.keyfile.is_some() {
            return Err("certfile and keyfile go together: the one proves nothing without the other".to_owned());
        }
        let has_files = address.cacertfile.is_some() || address.certfile.is_some();
        if has_files && !address.is_tls() {
            return Err("cacertfile, certfile and keyfile are for amqps:// alone".to_owned());
        }
        Ok(address)
    }
}

impl Address {
    fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        let file = || (!value.is_empty()).then(|| PathBuf::from(value)).ok_or(format!("{name} must name a PEM file"));
        match name {
            "heartbeat" => self.query.heartbeat = Some(number(name, value, 0..=u16::MAX.into())?),
            "frame_max" => self.query.frame_max = Some(number(name, value, FRAME_BYTES_ALLOWED)?),
            "channel_max" => self.query.channel_max = Some(number(name, value, 1..=u16::MAX.into())?),
            "connection_timeout" => self.query.connection_timeout = Some(number(name, value, 1..=600_000)?),
            "auth_mechanism" => {
                self.query.auth_mechanism = Some(match value.to_ascii_lowercase().as_str() {
                    "plain" => SASLMechanism::Plain,
                    "amqplain" => SASLMechanism::AMQPlain,
                    "external" => SASLMechanism::External,
                    "anonymous" => SASLMechanism::Anonymous,
                    _ => return Err("auth_mechanism must be plain, amqplain, external or anonymous".to_owned()),
                });
            }
            "cacertfile" => self.cacertfile = Some(file()?),
            "certfile" => self.certfile = Some(file()?),
            "keyfile" => self.keyfile = Some(file()?),
            // A piece of a password is no such word.
            name if !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_') => {
                return Err(format!("{name} is no parameter that is known here: there are {PARAMETERS}"));
            }
            _ => return Err(format!("{MUST_BE}; behind a ? there may be {PARAMETERS}; {ENCODE}")),
        }
        Ok(())
    }

    /// The name or address of the host; an IPv6 address has no brackets.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port.
    #[must_use]
    pub const fn port(&self) -> u16 {
        self.port
    }

    /// The user's name.
    #[must_use]
    pub fn user(&self) -> &str {
        &self.user
    }

    /// The user's password.
    #[must_use]
    pub const fn password(&self) -> &SecretString {
        &self.password
    }

    /// The virtual host.
    #[must_use]
    pub fn vhost(&self) -> &str {
        &self.vhost
    }

    /// Whether the way is encrypted.
    #[must_use]
    pub fn is_tls(&self) -> bool {
        self.scheme == AMQPScheme::AMQPS
    }

    /// How long a connection may take to be there.
    #[must_use]
    pub fn patience(&self) -> Duration {
        self.query.connection_timeout.map_or(RPC_TIMEOUT, Duration::from_millis)
    }

    /// What the AMQP library is told, and the largest frame that it asks for. Heartbeat, in whole seconds, and frames are
    /// those of the address where it sets them.
    pub(super) fn asking_for(&self, heartbeat: Duration) -> (AMQPUri, usize) {
        let frame_max = self.query.frame_max.unwrap_or(FRAME_BYTES_MAX);
        let ours = u16::try_from(heartbeat.as_secs().max(1)).unwrap_or(u16::MAX);
        let heartbeat = self.query.heartbeat.unwrap_or(ours);
        let userinfo = AMQPUserInfo { username: self.user.clone(), password: self.password.expose_secret().to_owned() };
        let uri = AMQPUri {
            scheme: self.scheme.clone(),
            authority: AMQPAuthority { userinfo, host: self.host.clone(), port: self.port },
            vhost: self.vhost.clone(),
            query: AMQPQueryString { frame_max: Some(frame_max), heartbeat: Some(heartbeat), ..self.query.clone() },
        };
        (uri, frame_max as usize)
    }

    /// The authorities to trust besides the system's, as PEM.
    pub(super) fn authorities(&self) -> io::Result<Option<String>> {
        self.cacertfile.as_ref().map(|file| read("cacertfile", file, CERTIFICATE)).transpose()
    }

    /// The certificate that proves who comes.
    pub(super) fn identity(&self) -> io::Result<Option<OwnedIdentity>> {
        let (Some(certificate), Some(key)) = (&self.certfile, &self.keyfile) else { return Ok(None) };
        let pem = read("certfile", certificate, CERTIFICATE)?.into_bytes();
        let key = read("keyfile", key, PRIVATE_KEY)?.into_bytes();
        Ok(Some(OwnedIdentity::PKCS8 { pem, key }))
    }
}

/// What the parts of a PEM file are called.
const CERTIFICATE: &str = "CERTIFICATE-----";
const PRIVATE_KEY: &str = "PRIVATE KEY-----";

fn read(parameter: &str, file: &PathBuf, part: &str) -> io::Result<String> {
    let told = |error: io::Error| io::Error::new(error.kind(), format!("{parameter} {}: {error}", file.display()));
    let pem = std::fs::read_to_string(file).map_err(told)?;
    let has_part = pem.lines().any(|line| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(part));
    has_part.then_some(pem).ok_or_else(|| told(io::Error::other(format!("it has no part BEGIN {part}"))))
}

/// Undoes percent-encoding. A percent sign that encodes nothing was meant to be one.
fn decode(part: &str) -> Result<String, String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digits = [rest.next(), rest.next()].map(|digit| digit.and_then(|digit| char::from(digit).to_digit(16)));
        let [Some(high), Some(low)] = digits else { return Err(ENCODE.to_owned()) };
        bytes.push(u8::try_from(high * 16 + low).unwrap_or_default());
    }
    String::from_utf8(bytes).map_err(|_| "user, password, host and virtual host must be UTF-8".to_owned())
}

fn number<N: TryFrom<u64>>(name: &str, value: &str, allowed: std::ops::RangeInclusive<u64>) -> Result<N, String> {
    let (least, most) = (*allowed.start(), *allowed.end());
    let number =
        value.parse().ok().filter(|number| allowed.contains(number)).and_then(|number| N::try_from(number).ok());
    number.ok_or_else(|| format!("{name} must be a number from {least} to {most}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(url: &str) -> Address {
        url.parse().unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    fn refused(url: &str) -> String {
        url.parse::<Address>().map(|address| panic!("{url}: {address}")).unwrap_err()
    }

    #[test]
    fn an_address_is_what_it_says() {
        for (url, shown) in [
            ("amqp://guest:guest@[2001:db8::1]:5672/", "[2001:db8::1]:5672, user guest, virtual host /"),
            ("amqp://guest:guest@[2001:db8::1]:5672", "[2001:db8::1]:5672, user guest, virtual host /"),
            ("amqps://[::1]/jobs", "[::1]:5671, user guest, virtual host jobs"),
            ("amqp://127.0.0.1", "127.0.0.1:5672, user guest, virtual host /"),
            ("AMQP://u%40x:p%3a%2f@my_host:1/%2f", "my_host:1, user u@x, virtual host /"),
            ("amqp://u:@h/a%2fb", "h:5672, user u, virtual host a/b"),
        ] {
            assert_eq!(read(url).to_string(), shown, "{url}");
        }
        assert_eq!(read("amqp://u:p%40%25@h").password().expose_secret(), "p@%");
        assert_eq!(read("amqp://[::1]").host(), "::1");
    }

    #[test]
    fn an_address_that_would_lead_elsewhere_is_refused_without_its_secrets() {
        for (url, what) in [
            ("amqp://dig:12/34secret@host/", "percent-encode"),
            ("amqp://dig:1?secret@host/", "percent-encode"),
            ("amqp://dig:1#secret@host/", "percent-encode"),
            ("amqp://dig:12?secret=/%2f", "no parameter"),
            ("amqp://dig:12?sEcret/%2f", "percent-encode"),
            ("amqp://dig:secret/x@host:5672/%2f", "percent-encode"),
            ("amqp://dig:100%secret@host/", "percent-encode"),
            ("amqp://dig:secret@host/a/b", "percent-encode"),
            ("amqp:///%2f", "no host"),
            ("amqp://", "must be"),
            ("amqp://u:secret@/%2f", "must be"),
            ("amqp://[2001:db8::g]/", "must be"),
            ("amqp://h:0/", "port"),
            ("amqp://h:99999/", "must be"),
            ("http://h/", "must be"),
            ("localhost:5672", "must be"),
            ("", "must be"),
        ] {
            let said = refused(url);
            assert!(said.contains(what), "{url}: {said}");
            assert!(!said.contains("secret") || what == "no parameter", "{url}: {said}");
        }
    }

    #[test]
    fn parameters_are_known_and_numbers() {
        for (query, what) in [
            ("frame_max=abc", "frame_max must be a number from 4096 to 1048576"),
            ("frame_max=0", "frame_max must be"),
            ("heartbeat=-1", "heartbeat must be a number from 0 to 65535"),
            ("heartbeat=70000", "heartbeat must be"),
            ("channel_max=0", "channel_max must be"),
            ("connection_timeout=", "connection_timeout must be"),
            ("auth_mechanism=magic", "auth_mechanism must be plain"),
            ("verify=verify_none", "verify is no parameter that is known here: there are auth_mechanism, cacertfile"),
            ("cacertfile=/ca.pem", "for amqps:// alone"),
            ("certfile=/c.pem", "go together"),
        ] {
            let said = refused(&format!("amqp://h/%2f?{query}"));
            assert!(said.contains(what), "{query}: {said}");
        }
        let address =
            read("amqps://h/%2f?cacertfile=/ca%20x.pem&certfile=c&keyfile=k&connection_timeout=50&heartbeat=7");
        assert_eq!(address.cacertfile.as_deref(), Some("/ca x.pem".as_ref()));
        assert_eq!(address.patience(), Duration::from_millis(50));
        assert!(address.authorities().unwrap_err().to_string().starts_with("cacertfile /ca x.pem: "));
    }

    #[test]
    fn what_the_address_sets_stays() {
        let asked = |url| {
            let (uri, frame_bytes_max) = read(url).asking_for(Duration::from_millis(500));
            (uri.query.heartbeat, uri.query.frame_max, frame_bytes_max)
        };
        assert_eq!(asked("amqp://h/%2f"), (Some(1), Some(32_768), 32_768));
        assert_eq!(asked("amqp://h/%2f?frame_max=4096"), (Some(1), Some(4096), 4096));
        assert_eq!(asked("amqp://h/%2f?heartbeat=60"), (Some(60), Some(32_768), 32_768));
    }

    #[test]
    fn nothing_shows_the_password() {
        let address = read("amqp://u:hush@h/v");
        assert!(!format!("{address:?} {address}").contains("hush"));
    }
}
