//! What a kind gets when its submission does not say: its queue, and how long its results are kept.

use tasklane_common::config::{ConfigError, RouteTable};
use tasklane_common::task::{Kind, QueueName};

use crate::request::RESULT_TTL_MS_MAX;

/// The `[[route]]` tables of the settings: the first that matches decides.
#[derive(Debug, Clone, Default)]
pub struct Routes(Vec<Route>);

#[derive(Debug, Clone)]
struct Route {
    pattern: Pattern,
    queue: QueueName,
    result_ttl_ms: Option<i64>,
}

/// A kind, or the beginning of kinds.
#[derive(Debug, Clone)]
pub(crate) enum Pattern {
    /// This one.
    Exact(Kind),
    /// Kinds that begin so.
    Prefix(String),
}

impl Routes {
    /// Takes the tables in their order.
    ///
    /// # Errors
    /// When a pattern is neither a kind nor the beginning of kinds followed by one `*`, or a time is out of its range.
    pub fn new(tables: &[RouteTable]) -> Result<Self, ConfigError> {
        tables.iter().map(Route::new).collect::<Result<_, _>>().map(Self)
    }

    /// The queue of a kind; `default` when no route matches.
    #[must_use]
    pub fn queue_of(&self, kind: &Kind) -> QueueName {
        self.route_of(kind).map(|route| route.queue.clone()).unwrap_or_default()
    }

    /// How long after its task's end a result of a kind is kept; `None` is as long as the task.
    #[must_use]
    pub fn result_ttl_ms_of(&self, kind: &Kind) -> Option<i64> {
        self.route_of(kind).and_then(|route| route.result_ttl_ms)
    }

    fn route_of(&self, kind: &Kind) -> Option<&Route> {
        self.0.iter().find(|route| route.pattern.matches(kind))
    }

    /// All queues that routes lead to.
    pub fn queues(&self) -> impl Iterator<Item = &QueueName> {
        self.0.iter().map(|route| &route.queue)
    }
}

impl Route {
    fn new(table: &RouteTable) -> Result<Self, ConfigError> {
        let RouteTable { kind, queue, result_ttl_ms } = table;
        if let Some(ms) = result_ttl_ms.filter(|ms| !(1..=RESULT_TTL_MS_MAX).contains(ms)) {
            let message = format!("must be from 1 to {RESULT_TTL_MS_MAX}, but is {ms} for kind {kind}");
            return Err(ConfigError::setting("route.result_ttl_ms", message));
        }
        Ok(Self { pattern: pattern(kind)?, queue: queue.clone(), result_ttl_ms: *result_ttl_ms })
    }
}

fn pattern(text: &str) -> Result<Pattern, ConfigError> {
    Pattern::parse(text).map_err(|rule| {
        let hint = "give a kind, or the beginning of kinds followed by *, such as email.*";
        ConfigError::setting("route.kind", format!("`{text}` {rule}; {hint}"))
    })
}

impl Pattern {
    /// Reads `email.send`, or `email.*`.
    ///
    /// # Errors
    /// Which rule of kinds it breaks.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let Some(prefix) = text.strip_suffix('*') else {
            return Kind::parse(text).map(Self::Exact).map_err(|error| error.to_string());
        };
        // The beginning of a kind need not be a whole kind: `email.` and the empty one are beginnings too.
        let sample = format!("{prefix}x");
        Kind::parse(&sample).map(|_| Self::Prefix(prefix.to_owned())).map_err(|error| error.to_string())
    }

    /// Whether it is meant.
    pub(crate) fn matches(&self, kind: &Kind) -> bool {
        match self {
            Self::Exact(exact) => exact == kind,
            Self::Prefix(prefix) => kind.as_str().starts_with(prefix),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(kind: &str, queue: &str) -> RouteTable {
        RouteTable { kind: kind.to_owned(), queue: QueueName::parse(queue).unwrap(), result_ttl_ms: None }
    }

    #[test]
    fn the_first_match_decides() {
        let tables = [table("email.urgent", "fast"), table("email.*", "emails"), table("rep*", "reports")];
        let routes = Routes::new(&tables).unwrap();
        let queue = |kind: &str| routes.queue_of(&Kind::parse(kind).unwrap()).to_string();
        assert_eq!(queue("email.urgent"), "fast");
        assert_eq!(queue("email.monthly"), "emails");
        assert_eq!(queue("report.build"), "reports");
        assert_eq!(queue("email"), "default");
    }

    #[test]
    fn a_star_matches_everything() {
        let routes = Routes::new(&[table("*", "all")]).unwrap();
        assert_eq!(routes.queue_of(&Kind::parse("x").unwrap()).as_str(), "all");
    }

    #[test]
    fn the_match_decides_how_long_results_are_kept() {
        let brief = RouteTable { result_ttl_ms: Some(5), ..table("report.*", "reports") };
        let routes = Routes::new(&[table("report.kept", "reports"), brief]).unwrap();
        let ttl = |kind: &str| routes.result_ttl_ms_of(&Kind::parse(kind).unwrap());
        assert_eq!((ttl("report.build"), ttl("report.kept"), ttl("a")), (Some(5), None, None));
        for ms in [0, -1, RESULT_TTL_MS_MAX + 1] {
            let error = Routes::new(&[RouteTable { result_ttl_ms: Some(ms), ..table("a", "q") }]).unwrap_err();
            let expected = format!("route.result_ttl_ms: must be from 1 to 31536000000, but is {ms} for kind a");
            assert_eq!(error.to_string(), expected);
        }
    }

    #[test]
    fn odd_patterns_are_refused() {
        for odd in ["", "a.*.b", "**", "a b", ".*"] {
            let error = Routes::new(&[table(odd, "q")]).unwrap_err().to_string();
            assert!(error.starts_with("route.kind: "), "{odd}: {error}");
        }
    }
}
