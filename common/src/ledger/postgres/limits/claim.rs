//! Claims that only a limit stands against.

use std::collections::{BTreeSet, HashMap};

use sqlx::{Connection, PgConnection, Row};
use uuid::Uuid;

use super::gates::{Look, Places, hold, scopes_of};
use crate::ledger::postgres::claim::grant;
use crate::ledger::postgres::fault::Fault;
use crate::ledger::postgres::rows::codes_for;
use crate::ledger::{Claim, ClaimRequest, Refusal};
use crate::limit::Scope;
use crate::state::Event;

const ASKED: &str = "
SELECT t.id, t.queue, t.kind, t.concurrency_key,
       ARRAY(SELECT p.scope FROM tasklane.limit_places p
             WHERE p.task_id = t.id AND p.fence IS NULL AND p.kept_until BETWEEN $3 AND $4)
FROM tasklane.tasks t
WHERE t.id = ANY($1) AND t.state = ANY($2)
ORDER BY t.id
FOR UPDATE OF t";

/// A task that is to take places.
struct Asked {
    id: Uuid,
    scopes: Vec<Scope>,
    /// Where a place is kept for it.
    kept: BTreeSet<String>,
}

/// Claims tasks that some limit fits and that nothing else stood against, or holds them. Leaves out those of which that is
/// not true any more.
pub(in crate::ledger::postgres) async fn claim(
    connection: &mut PgConnection,
    requests: &[&ClaimRequest],
) -> Result<Vec<(Uuid, Claim)>, Fault> {
    let mut transaction = connection.begin().await?;
    let mut look = Look::begin(&mut transaction).await?;
    let rows = sqlx::query(ASKED)
        .bind(requests.iter().map(|request| request.id.0).collect::<Vec<_>>())
        .bind(codes_for(Event::Claim))
        .bind(look.now)
        .bind(look.kept_until())
        .fetch_all(&mut *transaction)
        .await?;
    let mut asked = HashMap::with_capacity(rows.len());
    for row in &rows {
        let kept: Vec<String> = row.try_get(4)?;
        let task = Asked { id: row.try_get(0)?, scopes: scopes_of(row)?, kept: kept.into_iter().collect() };
        asked.insert(task.id, task);
    }
    look.load(&mut transaction, asked.values().flat_map(|task| &task.scopes)).await?;
    let (mut admitted, mut held) = (Vec::new(), Vec::new());
    for &request in requests {
        let Some(task) = asked.get_mut(&request.id.0) else { continue };
        task.scopes = look.gates.limited(std::mem::take(&mut task.scopes).into_iter());
        match look.gates.start(&task.scopes, |scope| task.kept.contains(&scope.to_string())) {
            Ok(()) => {
                look.changed.extend(task.scopes.iter().cloned());
                admitted.push(request);
            }
            Err(shut) => held.push((task.id, shut)),
        }
    }
    hold(&mut transaction, &held).await?;
    let mut answers: Vec<(Uuid, Claim)> =
        held.into_iter().map(|(id, _)| (id, Claim::Refused(Refusal::Limited))).collect();
    let granted = grant(&mut transaction, &admitted, true).await?;
    let mut places = Places::default();
    for (id, claim) in &granted {
        if let (Claim::Granted(granted), Some(task)) = (claim, asked.get(id)) {
            task.scopes.iter().for_each(|scope| places.push(scope, *id, Some(granted.fence.0), None));
        }
    }
    // One statement granted all, at one time.
    if let Some((_, Claim::Granted(granted))) = granted.first() {
        look.gates.started_at(granted.started_at.as_microsecond());
    }
    places.take(&mut transaction).await?;
    look.write_rates(&mut transaction).await?;
    transaction.commit().await?;
    answers.extend(granted);
    Ok(answers)
}
