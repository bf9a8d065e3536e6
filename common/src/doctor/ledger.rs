//! The ledger: whether it can be used, and whether it keeps what it commits.

use std::path::Path;

use secrecy::ExposeSecret;
use tokio::time::timeout;

use super::file_system::FileSystem;
use super::host::others_may;
use super::{Finding, LOOK_LIMIT, Subject, runs};
use crate::ledger::postgres::layout::Layout;
use crate::ledger::{LedgerError, SCHEMA_VERSION, postgres, sqlite};
use crate::task::LedgerId;

/// A clock that is further off shows in `run_at` and `delay_ms`.
const CLOCK_OFF_MAX: f64 = 1.0;
/// What one process may open.
const CONNECTIONS_OF_PROCESS: i64 = 14;
/// Less free space than this is soon used up.
const FREE_BYTES_MIN: u64 = 1 << 30;

pub(super) async fn look(subject: &Subject) -> (Vec<Finding>, Option<LedgerId>) {
    let url = subject.common.ledger_url.expose_secret();
    if let Some(path) = url.strip_prefix("sqlite://") {
        let (path, makes) = (sqlite::absolute(path.as_ref()), subject.role.makes_ledgers());
        // A dead file system holds its caller for ever: then this one's thread is left to it.
        let looking = timeout(LOOK_LIMIT, tokio::task::spawn_blocking(move || look_at_file(&path, makes))).await;
        return match looking {
            Ok(Ok(seen)) => seen,
            Ok(Err(error)) => (vec![Finding::fail("ledger.connection", error.to_string(), "report this")], None),
            Err(_) => {
                let advice = "is the file system alive? A ledger belongs on a local disk";
                (vec![Finding::fail("ledger.connection", "the file does not answer within 5 s", advice)], None)
            }
        };
    }
    if url.starts_with("postgres://") || url.starts_with("postgresql://") {
        return look_at_server(url).await;
    }
    let scheme = url.split_once("://").map_or("none", |(scheme, _)| scheme);
    let error = LedgerError::Address(format!("its scheme is {scheme}"));
    (vec![Finding::fail("ledger.connection", error.to_string(), "set TASKLANE_LEDGER_URL")], None)
}

async fn look_at_server(url: &str) -> (Vec<Finding>, Option<LedgerId>) {
    let vitals = match postgres::vitals::look(url).await {
        Ok(vitals) => vitals,
        Err(error) => {
            let advice = "is the server up, are address, user, password and database right?";
            return (vec![Finding::fail("ledger.connection", error.to_string(), advice)], None);
        }
    };
    let findings = vec![
        Finding::ok("ledger.connection", format!("{} answers", vitals.place)),
        server_version(&vitals),
        layout(&vitals.layout),
        durability(&vitals),
        writable(&vitals),
        clock(vitals.clock_ahead, vitals.clock_error),
        connections(vitals.connections, i64::from(vitals.max_connections)),
        runs::judge(&vitals.runs),
    ];
    (findings, vitals.id)
}

fn server_version(vitals: &postgres::vitals::Vitals) -> Finding {
    let check = "ledger.version";
    let (version, least, encoding) = (vitals.version, vitals.version_min, &vitals.encoding);
    if version < least {
        return Finding::fail(check, format!("PostgreSQL {version}"), format!("upgrade to {least} or newer"));
    }
    if encoding != "UTF8" {
        let advice = "create the database with ENCODING 'UTF8'";
        return Finding::fail(check, format!("PostgreSQL {version}, encoding {encoding}"), advice);
    }
    Finding::ok(check, format!("PostgreSQL {version}"))
}

/// Whether the database has a ledger, or room for one.
fn layout(found: &Result<Layout, LedgerError>) -> Finding {
    let check = "ledger.schema";
    match found {
        Ok(Layout::None) => Finding::ok(check, "none yet: the first start makes the schema tasklane"),
        Ok(Layout::Earlier { schema, version }) => {
            let message =
                format!("version {version} in the schema {schema}: the next start moves it to the schema tasklane");
            let advice = "stop the processes of the earlier release first: they do not find it there";
            Finding::warn(check, message, advice)
        }
        Ok(Layout::Current { version }) => schema(*version),
        Err(error @ LedgerError::Unsuitable(_)) => Finding::fail(check, error.to_string(), "no process starts before"),
        Err(error) => Finding::fail(check, error.to_string(), "is the server well?"),
    }
}

fn schema(found: i64) -> Finding {
    let check = "ledger.schema";
    if found > SCHEMA_VERSION {
        let message = format!("version {found}, and this release knows only up to {SCHEMA_VERSION}");
        return Finding::fail(check, message, "start a release at least as new as the one that wrote it");
    }
    match found {
        0 => Finding::ok(check, "none yet: the first start makes it"),
        found if found < SCHEMA_VERSION => {
            Finding::ok(check, format!("version {found}: the next start brings it up to {SCHEMA_VERSION}"))
        }
        found => Finding::ok(check, format!("version {found}")),
    }
}

/// What is answered with 2xx must be on disk.
fn durability(vitals: &postgres::vitals::Vitals) -> Finding {
    let settings = [
        ("fsync", &vitals.fsync),
        ("full_page_writes", &vitals.full_page_writes),
        ("synchronous_commit", &vitals.synchronous_commit),
    ];
    let off: Vec<_> =
        settings.iter().filter(|(_, value)| *value == "off").map(|(name, _)| format!("{name}=off")).collect();
    if off.is_empty() {
        return Finding::ok("ledger.durability", format!("synchronous_commit={}", vitals.synchronous_commit));
    }
    let advice = "a crash of the server loses commits: switch it on in postgresql.conf, and look for ALTER ROLE and ALTER DATABASE … SET";
    Finding::fail("ledger.durability", off.join(", "), advice)
}

fn writable(vitals: &postgres::vitals::Vitals) -> Finding {
    let check = "ledger.writable";
    if vitals.in_recovery {
        let advice = "name the primary, or all of them, and the one that takes writes is found: postgres://…@one,two/…";
        return Finding::fail(check, "the server is a standby", advice);
    }
    if vitals.read_only {
        return Finding::fail(check, "default_transaction_read_only=on", "switch it off for this user and database");
    }
    Finding::ok(check, "the server takes writes")
}

fn clock(ahead: f64, error: f64) -> Finding {
    let message = format!("the server's clock is {ahead:+.3} s off this machine's (±{error:.3} s)");
    if ahead.abs() - error > CLOCK_OFF_MAX {
        let advice = "leases do not mind, run_at and the times shown do: let NTP set both clocks";
        return Finding::warn("ledger.clock", message, advice);
    }
    Finding::ok("ledger.clock", message)
}

fn connections(open: i64, most: i64) -> Finding {
    let message = format!(
        "{open} of {most} connections are open, a process of Tasklane opens up to {CONNECTIONS_OF_PROCESS} and gives back what rests"
    );
    if most - open < CONNECTIONS_OF_PROCESS {
        return Finding::warn("ledger.connections", message, "raise max_connections, or run fewer processes");
    }
    Finding::ok("ledger.connections", message)
}

fn look_at_file(path: &Path, makes: bool) -> (Vec<Finding>, Option<LedgerId>) {
    let mut findings = vec![library()];
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    findings.extend(disk(folder));
    if !path.exists() {
        findings.push(if makes { new_file(path, folder) } else { missing_file(path) });
        return (findings, None);
    }
    match sqlite::vitals::look(path) {
        Ok(vitals) => {
            findings.push(Finding::ok("ledger.connection", format!("{} can be written", path.display())));
            findings.push(match &vitals.foreign {
                Some(error) => Finding::fail("ledger.schema", error, "set TASKLANE_LEDGER_URL"),
                None => schema(vitals.schema),
            });
            findings.push(journal(&vitals));
            findings.push(mode(path));
            findings.push(runs::judge(&vitals.runs));
            (findings, vitals.id)
        }
        Err(error) => {
            let advice = "the file, its -wal and -shm, and their folder must belong to the user of the processes";
            findings.push(Finding::fail("ledger.connection", format!("{}: {error}", path.display()), advice));
            (findings, None)
        }
    }
}

fn library() -> Finding {
    let (version, fit) = sqlite::vitals::library();
    if fit {
        return Finding::ok("ledger.version", format!("SQLite {version}"));
    }
    Finding::fail("ledger.version", format!("SQLite {version} can corrupt the ledger"), "build with 3.51.3 or newer")
}

/// The args of all tasks are in it.
fn mode(path: &Path) -> Finding {
    const CHECK: &str = "ledger.mode";
    match others_may(path) {
        Some(mode) => {
            let file = path.display();
            let advice = format!("chmod 600 {file} {file}-wal {file}-shm: it holds the args of all tasks");
            Finding::warn(CHECK, format!("any user of this machine may read {file} ({mode:o})"), advice)
        }
        None => Finding::ok(CHECK, "its owner's, or its group's"),
    }
}

fn missing_file(path: &Path) -> Finding {
    let advice = "name the producer's in ledger_url, or start the producer first: a worker makes none";
    Finding::fail("ledger.connection", format!("{} is not there", path.display()), advice)
}

fn new_file(path: &Path, folder: &Path) -> Finding {
    let may = rustix::fs::access(folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK);
    match may {
        Ok(()) => {
            Finding::ok("ledger.connection", format!("{} is not there: the first start makes it", path.display()))
        }
        Err(error) => Finding::fail(
            "ledger.connection",
            format!("{} cannot be made: {error}", path.display()),
            "the folder must be there and belong to the user of the processes",
        ),
    }
}

fn disk(folder: &Path) -> Vec<Finding> {
    let check = "ledger.disk";
    let found = match rustix::fs::statfs(folder) {
        Ok(found) => found,
        Err(error) => return vec![Finding::unseen(check, error, "does the folder of the ledger exist?")],
    };
    // The kernel's numbers have 32 bits; the field is wider, and signed, on some machines.
    let magic = (found.f_type as u64 & 0xffff_ffff) as u32;
    let kind = match FileSystem::of_magic(magic) {
        FileSystem::Remote(name) => Finding::fail(
            "ledger.file_system",
            format!("{} lies on {name}", folder.display()),
            "locks there cannot be trusted, and the ledger would be corrupted: a local disk, or PostgreSQL",
        ),
        FileSystem::Fleeting(name) => {
            let advice = "a ledger must outlive restarts: a disk, or a volume";
            Finding::warn("ledger.file_system", format!("{} lies on {name}", folder.display()), advice)
        }
        FileSystem::Local => Finding::ok("ledger.file_system", "local"),
    };
    let free = found.f_bavail.saturating_mul(u64::try_from(found.f_bsize).unwrap_or(0));
    let message = format!("{} MiB free", free >> 20);
    let space = if free < FREE_BYTES_MIN {
        Finding::warn(check, message, "a full disk stops every submission: make room, or shorten retention_ms")
    } else {
        Finding::ok(check, message)
    };
    vec![kind, space]
}

fn journal(vitals: &sqlite::vitals::Vitals) -> Finding {
    let mode = &vitals.journal_mode;
    if mode == "wal" || vitals.schema == 0 {
        return Finding::ok("ledger.journal", mode);
    }
    let advice = "somebody changed it: the next start of a process sets it to wal, unless another holds the file";
    Finding::warn("ledger.journal", format!("{mode} instead of wal"), advice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn a_schema_is_judged_by_its_version() {
        assert_eq!(schema(SCHEMA_VERSION).verdict, Verdict::Ok);
        assert_eq!(schema(SCHEMA_VERSION - 1).verdict, Verdict::Ok);
        assert_eq!(schema(0).verdict, Verdict::Ok);
        assert_eq!(schema(SCHEMA_VERSION + 1).verdict, Verdict::Fail);
    }

    #[test]
    fn a_clock_is_off_only_beyond_what_the_question_took() {
        assert_eq!(clock(-1.2, 0.01).verdict, Verdict::Warn);
        assert_eq!(clock(1.2, 0.5).verdict, Verdict::Ok);
        assert_eq!(clock(0.2, 0.0).verdict, Verdict::Ok);
    }

    #[test]
    fn a_file_that_all_may_read_is_warned_of() {
        use std::os::unix::fs::PermissionsExt;
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("ledger.db");
        std::fs::write(&path, "").unwrap();
        for (bits, verdict) in
            [(0o600, Verdict::Ok), (0o660, Verdict::Ok), (0o644, Verdict::Warn), (0o602, Verdict::Warn)]
        {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(bits)).unwrap();
            assert_eq!(mode(&path).verdict, verdict, "{bits:o}");
        }
    }

    #[test]
    fn a_file_of_another_application_is_no_ledger() {
        let place = tempfile::tempdir().unwrap();
        let found = |name: &str, sql: &str| {
            let path = place.path().join(name);
            rusqlite::Connection::open(&path).unwrap().execute_batch(sql).unwrap();
            look_at_file(&path, true).0.into_iter().find(|finding| finding.check == "ledger.schema").unwrap()
        };
        let versioned = found("versioned.db", "CREATE TABLE people (name); PRAGMA user_version = 10");
        assert_eq!(versioned.verdict, Verdict::Fail);
        assert!(versioned.message.contains("table tasks"), "{}", versioned.message);
        assert_eq!(found("tasks.db", "CREATE TABLE tasks (title)").verdict, Verdict::Fail);
        assert_eq!(found("people.db", "CREATE TABLE people (name)").verdict, Verdict::Ok);
    }

    #[test]
    fn a_file_that_cannot_be_written_or_made_is_told() {
        let place = tempfile::tempdir().unwrap();
        let verdict = |path: &Path| {
            let (findings, _) = look_at_file(path, true);
            findings.into_iter().find(|finding| finding.check == "ledger.connection").unwrap().verdict
        };
        assert_eq!(verdict(&place.path().join("new.db")), Verdict::Ok);
        assert!(!place.path().join("new.db").exists(), "the doctor makes nothing");
        let (findings, _) = look_at_file(&place.path().join("new.db"), false);
        assert!(findings.iter().any(|finding| finding.verdict == Verdict::Fail), "a worker makes none: {findings:?}");
        assert_eq!(verdict(&place.path().join("no/folder/new.db")), Verdict::Fail);
        std::fs::write(place.path().join("foreign.db"), "this is no database, but a text of some length").unwrap();
        assert_eq!(verdict(&place.path().join("foreign.db")), Verdict::Fail);
    }
}
