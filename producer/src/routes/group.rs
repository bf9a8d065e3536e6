//! `GET /v1/groups/{id}`: a batch with an end.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use tasklane_common::task::GroupId;

use crate::app::App;
use crate::error::{ApiError, Problem};
use crate::extract::Path;
use crate::extract::no_id;
use crate::grouping::GroupView;

/// Look at a group
///
/// The tasks of a batch with `then`, and where they stand. Its tasks themselves: `GET /v1/tasks?group=`.
#[utoipa::path(
    get, path = "/v1/groups/{id}", tag = "tasks", operation_id = "getGroup",
    params(("id" = uuid::Uuid, Path, description = "The group")),
    responses(
        (status = 200, description = "The group", body = GroupView),
        (status = 404, description = "No such group, or it ended so long ago that it is no longer kept", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The ledger is away, or too much is under way", body = Problem, content_type = "application/problem+json"),
    ),
)]
pub(crate) async fn group(State(app): State<Arc<App>>, Path(id): Path<String>) -> Result<Json<GroupView>, ApiError> {
    // A text that is no id is the id of no group.
    let id: GroupId = id.parse().map_err(|_| ApiError::UnknownGroup(no_id(&id, "a group's id is a UUID")))?;
    let group = app.gate.look(app.gate.ledger().group(id)).await?;
    group.map(|group| Json(group.into())).ok_or_else(|| ApiError::UnknownGroup(id.to_string()))
}
