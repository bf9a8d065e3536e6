use axum::body::Body;

use super::*;

fn hosts(names: &[&str]) -> Hosts {
    let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
    Hosts::parse(&names).unwrap().at("producer.example.net:8080")
}

fn code(hosts: &Hosts, method: Method, path: &str, headers: &[(&str, &str)]) -> Option<&'static str> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    hosts.check(&request.body(Body::empty()).unwrap()).err().map(|refusal| refusal.codes().1)
}

#[test]
fn addresses_and_names_that_nobody_can_own_are_known() {
    let hosts = hosts(&[]);
    for host in [
        "127.0.0.1:8080",
        "10.1.2.3",
        "127.1",
        "[::1]:8080",
        "[fe80::1]",
        "localhost:8080",
        "LOCALHOST.",
        "app.localhost",
        "producer:8080",
        "producer.tasks.svc.cluster.local",
        "producer.tasks.svc:8080",
        "printer.local",
        "producer.example.net",
    ] {
        assert_eq!(code(&hosts, Method::POST, "/v1/tasks", &[("host", host)]), None, "{host}");
    }
}

#[test]
fn other_names_need_the_setting() {
    let strict = hosts(&[]);
    let named = hosts(&["Tasks.example.com"]);
    let any = hosts(&["*"]);
    for host in ["tasks.example.com", "tasks.example.com:443", "TASKS.EXAMPLE.COM."] {
        assert_eq!(code(&strict, Method::GET, "/v1/tasks", &[("host", host)]), Some("unknown_host"), "{host}");
        assert_eq!(code(&named, Method::GET, "/v1/tasks", &[("host", host)]), None, "{host}");
        assert_eq!(code(&any, Method::GET, "/v1/tasks", &[("host", host)]), None, "{host}");
    }
    for host in
        ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "notlocalhost.dev", "x.tasks.example.com"]
    {
        assert_eq!(code(&named, Method::GET, "/metrics", &[("host", host)]), Some("unknown_host"), "{host}");
        assert_eq!(code(&named, Method::GET, "/healthz", &[("host", host)]), None, "a probe may call it {host}");
    }
    let absolute = code(&strict, Method::GET, "http://evil.example/v1/tasks", &[("host", "localhost")]);
    assert_eq!(absolute, Some("unknown_host"));
}

#[test]
fn a_host_must_be_there_once() {
    let hosts = hosts(&["*"]);
    for headers in [&[][..], &[("host", "")], &[("host", "a b")], &[("host", "u@a")], &[("host", "a"), ("host", "a")]] {
        assert_eq!(code(&hosts, Method::GET, "/healthz", headers), Some("invalid_header"), "{headers:?}");
    }
    let old = Request::builder().version(Version::HTTP_10).body(Body::empty()).unwrap();
    assert_eq!(hosts.check(&old), Ok(()), "a balancer's probe");
}

#[test]
fn pages_of_other_sites_are_refused() {
    let hosts = hosts(&["tasks.example.com"]);
    let local = ("host", "localhost:8080");
    let foreign: &[&[(&str, &str)]] = &[
        &[local, ("origin", "https://evil.example")],
        &[local, ("origin", "null")],
        &[local, ("origin", "")],
        &[local, ("origin", "http://localhost:3000")],
        &[local, ("origin", "http://localhost")],
        &[local, ("origin", "http://127.0.0.1:8080")],
        &[local, ("sec-fetch-site", "cross-site")],
        &[local, ("sec-fetch-site", "same-site")],
        &[local, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "iframe")],
        &[local, ("sec-fetch-site", "cross-site"), ("origin", "http://localhost:8080")],
        &[("host", "tasks.example.com"), ("origin", "https://evil.example")],
    ];
    for headers in foreign {
        for method in [Method::GET, Method::POST, Method::OPTIONS] {
            assert_eq!(code(&hosts, method, "/v1/queues/a/pause", headers), Some("foreign_origin"), "{headers:?}");
        }
    }
    let own: &[&[(&str, &str)]] = &[
        &[local],
        &[local, ("origin", "http://localhost:8080")],
        &[local, ("origin", "http://localhost:8080"), ("sec-fetch-site", "same-origin")],
        &[local, ("sec-fetch-site", "none")],
        &[("host", "tasks.example.com"), ("origin", "https://tasks.example.com"), ("sec-fetch-site", "same-origin")],
        &[("host", "tasks.example.com:443"), ("origin", "https://tasks.example.com")],
        // A balancer calls the producer by its address, and the settings name the balancer.
        &[("host", "10.0.0.3:8080"), ("origin", "https://tasks.example.com"), ("sec-fetch-site", "same-site")],
    ];
    for headers in own {
        assert_eq!(code(&hosts, Method::POST, "/v1/queues/a/pause", headers), None, "{headers:?}");
    }
    let link =
        [local, ("sec-fetch-site", "cross-site"), ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")];
    assert_eq!(code(&hosts, Method::GET, "/docs", &link), None, "a link that a person follows");
    assert_eq!(code(&hosts, Method::POST, "/v1/queues/a/pause", &link), Some("foreign_origin"), "a form");
}

#[test]
fn what_is_no_name_is_told() {
    for bad in ["", "https://a.example", "a.example:80", "a b", "*.example"] {
        let error = Hosts::parse(&[bad.to_owned()]).unwrap_err();
        assert!(error.contains(&format!("{bad:?}")), "{error}");
    }
}
