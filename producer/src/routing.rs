//! Which queue a kind goes to when its submission names none.

use tasklane_common::config::{ConfigError, RouteTable};
use tasklane_common::task::{Kind, QueueName};

/// The `[[route]]` tables of the settings: the first that matches decides.
#[derive(Debug, Clone, Default)]
pub struct Routes(Vec<Route>);

#[derive(Debug, Clone)]
struct Route {
    pattern: Pattern,
    queue: QueueName,
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
    /// When a pattern is neither a kind nor the beginning of kinds followed by one `*`.
    pub fn new(tables: &[RouteTable]) -> Result<Self, ConfigError> {
        let route = |table: &RouteTable| Ok(Route { pattern: pattern(&table.kind)?, queue: table.queue.clone() });
        tables.iter().map(route).collect::<Result<_, _>>().map(Self)
    }

    /// The queue of a kind; `default` when no route matches.
    #[must_use]
    pub fn queue_of(&self, kind: &Kind) -> QueueName {
        let route = self.0.iter().find(|route| route.pattern.matches(kind));
        route.map(|route| route.queue.clone()).unwrap_or_default()
    }

    /// All queues that routes lead to.
    pub fn queues(&self) -> impl Iterator<Item = &QueueName> {
        self.0.iter().map(|route| &route.queue)
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
        RouteTable { kind: kind.to_owned(), queue: QueueName::parse(queue).unwrap() }
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
    fn odd_patterns_are_refused() {
        for odd in ["", "a.*.b", "**", "a b", ".*"] {
            let error = Routes::new(&[table(odd, "q")]).unwrap_err().to_string();
            assert!(error.starts_with("route.kind: "), "{odd}: {error}");
        }
    }
}
