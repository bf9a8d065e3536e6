//! Which handler does which kind.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use tasklane_common::task::{Json, Kind, NameError, QueueName};

use crate::handler::{Handler, HandlerError, Options, Outcome, TaskContext};

/// A handler whose kind and args are known only at run time, such as one from the settings file.
#[async_trait]
pub trait DynHandler: Send + Sync + 'static {
    /// How its tasks are to be treated.
    fn options(&self) -> Options;

    /// Does the work on the args as they came.
    ///
    /// # Errors
    /// As [`Handler::handle`].
    async fn handle_json(&self, args: Json, cx: &TaskContext) -> Result<Outcome, HandlerError>;
}

#[async_trait]
impl<H: Handler> DynHandler for H {
    fn options(&self) -> Options {
        Handler::options(self)
    }

    async fn handle_json(&self, args: Json, cx: &TaskContext) -> Result<Outcome, HandlerError> {
        let args = serde_json::from_str(args.as_str())
            .map_err(|error| HandlerError::args(&format!("the args do not fit kind {}: {error}", H::KIND)))?;
        self.handle(args, cx).await
    }
}

/// The handlers of a worker. At least one; no kind twice.
#[derive(Clone)]
pub struct Registry(Arc<BTreeMap<Kind, Arc<dyn DynHandler>>>);

/// Why handlers make no registry.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// There is no handler at all.
    #[error(
        "this worker has no handlers: add [[command]] or [[http]] to its settings file, or register a Rust handler"
    )]
    Empty,
    /// Two handlers claim one kind.
    #[error("kind {0} has two handlers: every kind must have one")]
    Duplicate(Kind),
    /// A handler's kind is not a kind.
    #[error("kind {kind:?} {error}")]
    Kind {
        /// What the handler declares.
        kind: String,
        /// Why it is none.
        error: NameError,
    },
}

/// Collects handlers.
#[derive(Default)]
pub struct RegistryBuilder {
    handlers: BTreeMap<Kind, Arc<dyn DynHandler>>,
    error: Option<RegistryError>,
}

impl Registry {
    /// Begins with no handlers.
    #[must_use]
    pub fn builder() -> RegistryBuilder {
        RegistryBuilder::default()
    }

    /// The handler of a kind.
    #[must_use]
    pub fn get(&self, kind: &Kind) -> Option<&Arc<dyn DynHandler>> {
        self.0.get(kind)
    }

    /// The kinds, sorted.
    #[must_use]
    pub fn kinds(&self) -> Vec<Kind> {
        self.0.keys().cloned().collect()
    }

    /// The queues that handlers ask for.
    #[must_use]
    pub fn queues(&self) -> BTreeSet<QueueName> {
        self.0.values().filter_map(|handler| handler.options().queue).collect()
    }
}

impl RegistryBuilder {
    /// Adds a Rust handler.
    #[must_use]
    pub fn handler<H: Handler>(mut self, handler: H) -> Self {
        match Kind::parse(H::KIND) {
            Ok(kind) => self.named(kind, Arc::new(handler)),
            Err(error) => {
                self.error.get_or_insert(RegistryError::Kind { kind: H::KIND.to_owned(), error });
                self
            }
        }
    }

    /// Adds a handler under a kind that is known only now.
    #[must_use]
    pub fn named(mut self, kind: Kind, handler: Arc<dyn DynHandler>) -> Self {
        if self.handlers.insert(kind.clone(), handler).is_some() {
            self.error.get_or_insert(RegistryError::Duplicate(kind));
        }
        self
    }

    /// Checks the collection.
    ///
    /// # Errors
    /// [`RegistryError`]: the first fault found.
    pub fn build(self) -> Result<Registry, RegistryError> {
        match self.error {
            Some(error) => Err(error),
            None if self.handlers.is_empty() => Err(RegistryError::Empty),
            None => Ok(Registry(Arc::new(self.handlers))),
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}
