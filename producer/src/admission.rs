//! Bounds the requests under way: what comes above is refused at once, with `Retry-After`, instead of queueing up.

use std::sync::{Arc, Mutex, PoisonError};

use axum::extract::{FromRequestParts, Request, State};
use axum::http::request;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::ApiError;

/// How many requests may be under way; those that only wait for a task's end are counted elsewhere.
const REQUESTS_MAX: usize = 4096;

/// The places for requests; clones share them.
#[derive(Debug, Clone)]
pub struct Admission(Arc<Semaphore>);

/// The place of one request, which it may leave before its end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Place(Arc<Mutex<Option<OwnedSemaphorePermit>>>);

impl Default for Admission {
    fn default() -> Self {
        Self::new(REQUESTS_MAX)
    }
}

impl Admission {
    /// So many places.
    #[must_use]
    pub fn new(requests_max: usize) -> Self {
        Self(Arc::new(Semaphore::new(requests_max)))
    }
}

impl Place {
    /// Makes room for another request; the work of this one is done, but for waiting.
    pub(crate) fn leave(&self) {
        drop(self.0.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Lets a request through if there is a place for it.
pub(crate) async fn admit(State(admission): State<Admission>, mut request: Request, next: Next) -> Response {
    let Ok(permit) = Arc::clone(&admission.0).try_acquire_owned() else {
        return ApiError::Overloaded.into_response();
    };
    let place = Place(Arc::new(Mutex::new(Some(permit))));
    request.extensions_mut().insert(place.clone());
    let response = next.run(request).await;
    place.leave();
    response
}

impl<S: Sync> FromRequestParts<S> for Place {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut request::Parts, _: &S) -> Result<Self, ApiError> {
        Ok(parts.extensions.get::<Self>().cloned().unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::body::Body;
    use axum::http::StatusCode;
    use axum::middleware::from_fn_with_state;
    use axum::routing::get;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_request_too_many_is_refused_and_a_waiting_one_makes_room() {
        let inner_answer = async |router: Router| router.oneshot(Request::new(Body::empty())).await.unwrap().status();
        let admission = Admission::new(1);
        let layer = from_fn_with_state(admission.clone(), admit);
        let inner = Router::new().route("/", get(async || "in")).layer(layer.clone());
        let outer = Router::new().route(
            "/",
            get(async move |place: Place| {
                let refused = inner_answer(inner.clone()).await;
                place.leave();
                let let_in = inner_answer(inner).await;
                format!("{refused} {let_in}")
            }),
        );
        let answer = outer.layer(layer).oneshot(Request::new(Body::empty())).await.unwrap();
        let text = axum::body::to_bytes(answer.into_body(), 1000).await.unwrap();
        assert_eq!(text, format!("{} {}", StatusCode::SERVICE_UNAVAILABLE, StatusCode::OK));
        assert_eq!(admission.0.available_permits(), 1);
    }
}
