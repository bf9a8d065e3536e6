//! Who may call by way of a browser: no page of another site, and none whose name was pointed at this machine.
//!
//! A page can have its reader's browser send requests to anything that the browser reaches. Those carry the page's
//! `Origin`, or say `Sec-Fetch-Site: cross-site`. A page that gives its own name this machine's address (DNS
//! rebinding) shows itself by that name in `Host`. So no name is known that a stranger can own, unless the settings
//! name it.

use std::net::Ipv6Addr;
use std::sync::Arc;

use axum::extract::Request;
use axum::http::uri::Authority;
use axum::http::{HeaderMap, HeaderName, Method, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::task::truncate;

const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");
const SEC_FETCH_MODE: HeaderName = HeaderName::from_static("sec-fetch-mode");
const SEC_FETCH_DEST: HeaderName = HeaderName::from_static("sec-fetch-dest");

/// Ends of names that nobody can register: they belong to the machine or the network that resolves them.
const RESERVED: [&str; 5] = ["localhost", "local", "internal", "svc", "home.arpa"];
/// Say nothing but that a process lives, to probes that send whatever name they like.
const PROBES: [&str; 2] = ["/healthz", "/readyz"];
/// The longest name of the DNS.
const NAME_BYTES_MAX: usize = 253;

/// The names by which a program may be called; clones share them.
#[derive(Debug, Clone, Default)]
pub struct Hosts {
    named: Arc<[String]>,
    own: Arc<[String]>,
    any: bool,
}

/// Why a request is not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// HTTP/1.1 without a host, or with one that cannot be read.
    #[error("the Host header must be given once, as a name or address and perhaps a port")]
    NoHost,
    /// A name that is not known to be this program's.
    #[error("this program does not answer to the name {0}: add it to http_hosts if clients call it so")]
    UnknownHost(String),
    /// A page of another site has the browser send this.
    #[error("the request comes from a page of another site, {0}; add its name to http_hosts if it may call")]
    ForeignOrigin(String),
}

impl Hosts {
    /// The names of the setting `http_hosts`, or `*` for any name.
    ///
    /// # Errors
    /// What is no name, and what would be one.
    pub fn parse(names: &[String]) -> Result<Self, String> {
        let mut named = Vec::with_capacity(names.len());
        for name in names.iter().filter(|name| *name != "*") {
            let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(fits) {
                return Err(format!(
                    "must be names such as tasks.example.com, without scheme and port, or `*`, but one is {name:?}"
                ));
            }
            named.push(plain(name));
        }
        Ok(Self { named: named.into(), own: Arc::default(), any: names.iter().any(|name| name == "*") })
    }

    /// Adds the name of the address that is listened on, `host:port`, and the machine's own.
    #[must_use]
    pub fn at(self, addr: &str) -> Self {
        let listened = addr.rsplit_once(':').map_or(addr, |(host, _)| host);
        let machine = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self { own: [plain(listened), plain(&machine)].into(), ..self }
    }

    /// Whether a request may come in.
    ///
    /// # Errors
    /// [`Refusal`] says why not.
    pub fn check(&self, request: &Request) -> Result<(), Refusal> {
        let headers = request.headers();
        let host = host(headers, request.version())?;
        // A target in absolute form goes before the header, which is checked all the same: either may be believed by somebody.
        for authority in [request.uri().authority(), host.as_ref()].into_iter().flatten() {
            if !PROBES.contains(&request.uri().path()) && !self.knows(authority.host()) {
                return Err(Refusal::UnknownHost(truncate(authority.host(), NAME_BYTES_MAX)));
            }
        }
        self.check_origin(request.method(), headers, host.as_ref())
    }

    fn check_origin(&self, method: &Method, headers: &HeaderMap, host: Option<&Authority>) -> Result<(), Refusal> {
        let site = text(headers, &SEC_FETCH_SITE);
        let from_elsewhere = ["cross-site", "same-site"].contains(&site);
        for origin in headers.get_all(header::ORIGIN) {
            let origin = origin.to_str().unwrap_or("unreadable");
            let authority = origin.split_once("://").and_then(|(_, rest)| rest.parse::<Authority>().ok());
            let is = |other: &Authority| authority.as_ref().is_some_and(|authority| same(authority, other, origin));
            let named = authority.as_ref().is_some_and(|origin| self.named.contains(&plain(origin.host())));
            if !named && (from_elsewhere || !host.is_some_and(is)) {
                return Err(Refusal::ForeignOrigin(truncate(origin, NAME_BYTES_MAX)));
            }
        }
        // Who follows a link sees the answer, and the page with the link does not.
        let followed = method == Method::GET
            && text(headers, &SEC_FETCH_MODE) == "navigate"
            && text(headers, &SEC_FETCH_DEST) == "document";
        if from_elsewhere && !followed && !headers.contains_key(header::ORIGIN) {
            return Err(Refusal::ForeignOrigin(format!("as Sec-Fetch-Site: {site} says")));
        }
        Ok(())
    }

    fn knows(&self, host: &str) -> bool {
        let name = plain(host);
        let reserved = |end: &str| name.strip_suffix(end).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'));
        self.any
            || is_address(&name)
            // The DNS of the world has no hosts of one label: those are of this network, such as a container's.
            || !name.contains('.')
            || RESERVED.into_iter().any(reserved)
            || self.own.contains(&name)
            || self.named.contains(&name)
    }
}

impl Refusal {
    /// The status code, and the code for programs.
    #[must_use]
    pub const fn codes(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NoHost => (StatusCode::BAD_REQUEST, "invalid_header"),
            Self::UnknownHost(_) => (StatusCode::FORBIDDEN, "unknown_host"),
            Self::ForeignOrigin(_) => (StatusCode::FORBIDDEN, "foreign_origin"),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (status, code) = self.codes();
        let problem = serde_json::json!({
            "type": format!("urn:tasklane:problem:{code}"),
            "title": status.canonical_reason(),
            "status": status.as_u16(),
            "detail": self.to_string(),
            "code": code,
        });
        (status, [(header::CONTENT_TYPE, "application/problem+json")], problem.to_string()).into_response()
    }
}

/// A layer for routers that have no errors of their own.
pub async fn let_in(hosts: Hosts, request: Request, next: Next) -> Response {
    match hosts.check(&request) {
        Ok(()) => next.run(request).await,
        Err(refusal) => refusal.into_response(),
    }
}

/// The one host that a request is for; HTTP/1.0, which no browser speaks, needs none.
fn host(headers: &HeaderMap, version: Version) -> Result<Option<Authority>, Refusal> {
    let mut given = headers.get_all(header::HOST).iter();
    match (given.next(), given.next()) {
        (None, _) if version < Version::HTTP_11 => Ok(None),
        (Some(host), None) => {
            let authority = host.to_str().ok().and_then(|host| host.parse::<Authority>().ok());
            authority
                .filter(|host| !host.host().is_empty() && !host.as_str().contains('@'))
                .map(Some)
                .ok_or(Refusal::NoHost)
        }
        _ => Err(Refusal::NoHost),
    }
}

/// Whether an origin is the place that was asked. Behind a proxy the scheme that is seen here is not the browser's, so
/// a port that is left out on one side fits the default ports of both schemes.
fn same(origin: &Authority, host: &Authority, url: &str) -> bool {
    let default = if url.starts_with("https:") { 443 } else { 80 };
    let port = |authority: &Authority| authority.port_u16().unwrap_or(default);
    plain(origin.host()) == plain(host.host()) && port(origin) == port(host)
}

fn text<'h>(headers: &'h HeaderMap, name: &HeaderName) -> &'h str {
    headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// A name as it is compared.
fn plain(host: &str) -> String {
    host.trim_end_matches('.').to_ascii_lowercase()
}

/// An IP address in any of the forms that clients send; a last label of digits is one of IPv4.
fn is_address(host: &str) -> bool {
    let v6 = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
    v6.is_some_and(|v6| v6.split('%').next().unwrap_or_default().parse::<Ipv6Addr>().is_ok())
        || host.rsplit('.').next().is_some_and(|label| !label.is_empty() && label.bytes().all(|b| b.is_ascii_digit()))
}

#[cfg(test)]
mod tests;
