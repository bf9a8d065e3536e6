use super::*;
use crate::task::Guarantee;

fn error(text: &str) -> String {
    File::parse(Path::new("t.toml"), text).unwrap_err().to_string()
}

#[test]
fn faults_name_file_line_and_key() {
    let unknown = error("log = \"info\"\nconcurency = 4\n");
    assert!(unknown.starts_with("t.toml:2:1: unknown field `concurency`, expected one of"), "{unknown}");
    let kind = error("[[command]]\nkind = \"no kind\"\nargv = [\"true\"]\n");
    assert!(kind.starts_with("t.toml:2:8: must match"), "{kind}");
    assert!(kind.ends_with("(key `kind`)"), "{kind}");
    assert!(error("x = [").starts_with("t.toml:1:"));
    let keyless = error("postgres://user:secret@host/db?sslmode=disable\n");
    assert!(keyless.starts_with("t.toml:1:") && !keyless.contains("secret"), "{keyless}");
}

/// Each tells the line, the key, and what would be right.
#[test]
fn faults_of_retries_name_the_key_and_what_is_allowed() {
    let command = "[[command]]\nkind = \"k\"\nargv = [\"true\"]\n";
    let http = "[[http]]\nkind = \"k\"\nurl = \"http://x/\"\n";
    for (table, line, fault) in [
        (command, "retry = { policy = \"cubic\" }", "expected one of `exponential`, `linear`, `fixed`"),
        (http, "retry = { policy = \"fixed\" }", "policy fixed needs delays_ms: 1 to 1000"),
        (command, "discard_exit_codes = [65, 256]", "must be exit codes from 1 to 255, but one is 256"),
        (command, "discard_exit_codes = [0]", "must be exit codes from 1 to 255, but one is 0"),
        (http, "discard_statuses = [200]", "must be statuses from 300 to 599, but one is 200"),
        (http, "discard_errors = [\"slow\"]", "must be of error, panic, timeout, but one is \"slow\""),
        (command, "discard_errors = [\"crash\"]", "must be of error, panic, timeout, but one is \"crash\""),
    ] {
        let told = error(&format!("{table}{line}\n"));
        let key = line.split(' ').next().unwrap();
        assert!(told.starts_with("t.toml:4:") && told.contains(fault), "{line}\n{told}");
        assert!(told.ends_with(&format!("(key `{key}`)")), "{line}\n{told}");
    }
}

#[test]
fn the_contract_example_is_read() {
    let file = File::parse(
        Path::new("t.toml"),
        r#"
        [[command]]
        kind = "report.build"
        queue = "default"
        argv = ["/usr/local/bin/build-report", "--json"]
        timeout_ms = 60000
        guarantee = "at_most_once"

        [[http]]
        kind = "crm.sync"
        url = "http://127.0.0.1:9000/sync"
        timeout_ms = 10000
        "#,
    )
    .unwrap();
    assert_eq!(file.command[0].guarantee, Guarantee::AtMostOnce);
    assert_eq!(file.http[0].kind.as_str(), "crm.sync");
}
