//! The one HTTP client behind the harness.

use std::sync::Once;
use std::time::Duration;

use anyhow::{Context, Result};

/// Longer than any `wait_ms` a test uses, so that a hung server becomes an error and not a hung test.
const REQUEST_LIMIT: Duration = Duration::from_secs(120);

/// A client with a limit on every request. Plain HTTP on loopback, but the workspace builds reqwest with TLS, which
/// wants to know its cryptography before the first client is built.
pub(crate) fn client() -> Result<reqwest::Client> {
    builder().build().context("building the HTTP client")
}

/// A client that opens a connection for each request, and so can be used on any runtime, as clean-ups must.
pub(crate) fn connecting_client() -> Result<reqwest::Client> {
    builder().pool_max_idle_per_host(0).build().context("building the HTTP client")
}

fn builder() -> reqwest::ClientBuilder {
    static CRYPTOGRAPHY: Once = Once::new();
    CRYPTOGRAPHY.call_once(|| {
        // Refused only if a provider is there already, and any will do.
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
    reqwest::Client::builder().no_proxy().redirect(reqwest::redirect::Policy::none()).timeout(REQUEST_LIMIT)
}
