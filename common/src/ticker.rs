//! Fires schedules. Every process runs one, and none of them leads: the ledger moves a schedule on from a tick once, and
//! the tick's task is part of that write. Whoever dies before it has done nothing, and after it any relay publishes.

use std::collections::HashSet;
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::{millis, timestamp};
use crate::events::{Events, Happening, TaskEvent};
use crate::labels::Labels;
use crate::ledger::{Fired, Firing, LedgerError, SharedLedger, Unreadable, complain};
use crate::schedule::plan::{Plan, Watched, plan};
use crate::schedule::{SCHEDULES_MAX, Schedule, ScheduleName, TimetableError};
use crate::state::State;
use crate::task::NewTask;

/// How many schedules one round fires.
const ROUND_MAX: u32 = 64;
/// The longest sleep: a schedule may have been made meanwhile by another process.
const SLEEP_MAX: Duration = Duration::from_millis(200);
/// How long others are left alone who fire what is due.
const OVERTAKEN_PAUSE: Duration = Duration::from_millis(20);
const ERROR_PAUSE: Duration = Duration::from_secs(1);
/// Processes wake up for a tick at slightly different times, so that most find it fired.
const SPREAD_MS: u64 = 15;
/// Whoever has not looked for so long was away: ticks in between may have been missed.
const AWAY: Duration = Duration::from_secs(5);
/// How long a process watches before it judges that a tick was missed: one that has watched for longer may be about to
/// fire it.
const SETTLE: Duration = Duration::from_secs(2);
/// A tick that is so late was missed, whoever watched.
const LATE_MAX: Duration = Duration::from_secs(60);

/// Fires until the shutdown.
pub async fn run(ledger: SharedLedger, events: Events, shutdown: CancellationToken) {
    let mut ticker = Ticker { ledger, events, watch: Watch::default(), unreadable: HashSet::new() };
    while !shutdown.is_cancelled() {
        let pause = match ticker.round().await {
            Ok(pause) => pause,
            Err(error) => {
                complain(&error, "schedules cannot be fired");
                ERROR_PAUSE
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shutdown.cancelled() => return,
        }
    }
}

/// Since when this process has watched, by the ledger's clock.
#[derive(Debug, Default)]
struct Watch {
    since: Option<Timestamp>,
    last: Option<Timestamp>,
}

impl Watch {
    /// Notes a look, and answers since when there was no gap. A clock that jumps makes one.
    fn look(&mut self, now: Timestamp) -> Timestamp {
        let gap = self.last.map(|last| now.as_millisecond() - last.as_millisecond());
        let watched = gap.is_some_and(|gap| (0..=millis(AWAY)).contains(&gap));
        self.last = Some(now);
        let since = self.since.filter(|_| watched).unwrap_or(now);
        self.since = Some(since);
        since
    }
}

struct Ticker {
    ledger: SharedLedger,
    events: Events,
    watch: Watch,
    /// Revisions that this build cannot read, each told once.
    unreadable: HashSet<Uuid>,
}

/// What became of a schedule that was due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    Moved,
    Overtaken,
}

impl Ticker {
    /// Fires what is due, and tells how long nothing will be.
    async fn round(&mut self) -> Result<Duration, LedgerError> {
        // What nobody here can fire stays due, and must not take the places of what can be fired.
        let unreadable = u32::try_from(self.unreadable.len()).unwrap_or(0).min(SCHEDULES_MAX as u32);
        let looked = self.ledger.due_schedules(ROUND_MAX + unreadable).await?;
        let since = self.watch.look(looked.now);
        let late = timestamp(looked.now.as_millisecond() - millis(LATE_MAX));
        let settled = looked.now.as_millisecond() - since.as_millisecond() >= millis(SETTLE);
        let watched = Watched { now: looked.now, since: since.max(late) };
        let mut firings = Vec::new();
        for schedule in &looked.due {
            let missed = schedule.next_at.is_some_and(|tick| tick < watched.since);
            if missed && !settled {
                continue;
            }
            match firing(schedule, watched) {
                Ok(firing) => firings.extend(firing),
                Err(error) => self.cannot_fire(&schedule.name, schedule.revision, &error.to_string()),
            }
        }
        for Unreadable { name, revision, problem } in &looked.unreadable {
            self.cannot_fire(name, *revision, problem);
        }
        self.plan_again(&looked.ahead, looked.now).await?;
        let done = join_all(firings.into_iter().map(|firing| self.fire(firing))).await;
        let done = done.into_iter().collect::<Result<Vec<_>, _>>()?;
        if done.contains(&Done::Moved) {
            return Ok(Duration::ZERO);
        }
        let wait = if looked.due.is_empty() && looked.unreadable.is_empty() {
            looked.wait.unwrap_or(SLEEP_MAX)
        } else {
            SLEEP_MAX
        };
        let wait = if done.contains(&Done::Overtaken) { OVERTAKEN_PAUSE } else { wait };
        Ok(wait.min(SLEEP_MAX) + Duration::from_millis(rand::random_range(0..SPREAD_MS)))
    }

    /// Computes next ticks again that a clock has told which was ahead: until then nothing would be fired.
    async fn plan_again(&mut self, ahead: &[Schedule], now: Timestamp) -> Result<(), LedgerError> {
        let mut moved = 0;
        for schedule in ahead {
            match planned_again(schedule, now) {
                Ok(Some(firing)) => moved += u32::from(self.fire(firing).await? == Done::Moved),
                Ok(None) => {}
                Err(error) => self.cannot_fire(&schedule.name, schedule.revision, &error.to_string()),
            }
        }
        if moved > 0 {
            tracing::warn!(schedules = moved, "the ledger's clock has gone back: next ticks were computed again");
        }
        Ok(())
    }

    /// Tells it once.
    fn cannot_fire(&mut self, name: &ScheduleName, revision: Uuid, problem: &str) {
        if self.unreadable.len() > 2 * SCHEDULES_MAX as usize {
            self.unreadable.clear();
        }
        if self.unreadable.insert(revision) {
            tracing::error!(
                schedule = %name, problem, "this process cannot fire the schedule: is another release in use?"
            );
        }
    }

    /// Writes one decision. Whoever else has made it first has also logged and counted it.
    async fn fire(&self, firing: Firing) -> Result<Done, LedgerError> {
        let (name, missed) = (firing.name.clone(), firing.missed);
        let newest = firing.tasks.last().map(|(tick, _)| *tick);
        let told: Vec<_> = match self.events.wanted() {
            true => firing.tasks.iter().map(|(_, task)| submitted(task)).collect(),
            false => Vec::new(),
        };
        let fired = match self.ledger.fire(firing).await? {
            Fired::Overtaken => return Ok(Done::Overtaken),
            Fired::Recorded(count) => {
                if let Some(tick) = newest {
                    tracing::debug!(schedule = %name, %tick, tasks = count, "a schedule has fired");
                }
                // With fewer it is not known which of them are new.
                if told.len() == count as usize {
                    told.into_iter().for_each(|event| self.events.tell(|| event));
                }
                count
            }
            Fired::Skipped(obstacle) => {
                if let Some(tick) = newest {
                    tracing::info!(
                        schedule = %name, %tick, task.id = %obstacle,
                        "a tick was skipped: this task of an earlier one is unfinished"
                    );
                }
                count(&name, "skipped", 1);
                0
            }
        };
        if missed > 0 {
            tracing::info!(schedule = %name, missed, "ticks have passed while nothing was there to fire them");
        }
        count(&name, "fired", fired);
        count_missed(&name, missed);
        Ok(Done::Moved)
    }
}

fn submitted(task: &NewTask) -> TaskEvent {
    let at = Timestamp::now();
    let waits = task.run_at.is_some_and(|run_at| run_at > at);
    TaskEvent {
        at,
        id: task.id,
        kind: task.kind.clone(),
        queue: task.queue.clone(),
        event: Happening::Submitted,
        state: if waits { State::Scheduled } else { State::Accepted },
        attempt: 0,
        worker_id: None,
    }
}

/// Counts ticks that are not fired any more.
pub fn count_missed(schedule: &ScheduleName, ticks: u32) {
    count(schedule, "missed", ticks);
}

fn count(schedule: &ScheduleName, outcome: &'static str, ticks: u32) {
    static NAMES: Labels = Labels::new();
    let schedule = NAMES.of(schedule.as_str());
    for each in ["fired", "skipped", "missed"] {
        // All three are there from the first tick on: the first of another sort is seen as an increase.
        let ticks = if each == outcome { ticks.into() } else { 0 };
        metrics::counter!("tasklane_schedule_ticks_total", "schedule" => schedule.clone(), "outcome" => each)
            .increment(ticks);
    }
}

/// What is written about a schedule that is due; nothing of one that is paused.
fn firing(schedule: &Schedule, watched: Watched) -> Result<Option<Firing>, TimetableError> {
    let Some(tick) = schedule.next_at else { return Ok(None) };
    let definition = &schedule.definition;
    let Plan { fire, missed, next } = plan(definition, &definition.timetable()?, tick, watched)?;
    let tasks = fire.into_iter().map(|tick| (tick, definition.task_at(&schedule.name, tick))).collect();
    let (name, revision, overlap) = (schedule.name.clone(), schedule.revision, definition.overlap);
    Ok(Some(Firing { name, revision, tick, next, tasks, missed, overlap }))
}

/// What moves a schedule to its next tick from now on. A tick that was fired just before is not the next one again.
fn planned_again(schedule: &Schedule, now: Timestamp) -> Result<Option<Firing>, TimetableError> {
    let Some(tick) = schedule.next_at else { return Ok(None) };
    let fired = schedule.last_tick.filter(|last| last.as_millisecond() - now.as_millisecond() <= millis(LATE_MAX));
    let next = schedule.definition.timetable()?.next_after(fired.map_or(now, |last| last.max(now)))?;
    let (name, revision, overlap) = (schedule.name.clone(), schedule.revision, schedule.definition.overlap);
    Ok(Some(Firing { name, revision, tick, next, tasks: Vec::new(), missed: 0, overlap }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::NextTick;
    use crate::ledger::conformance::schedule::{anew, definition};
    use crate::publisher::Publisher;
    use crate::schedule::{CatchUp, Definition, TickCounts};

    /// A process that has just started does not know whether one that watched before is about to fire the tick.
    #[tokio::test]
    async fn a_tick_of_before_its_watch_is_left_to_others_for_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let url = format!("sqlite://{}", folder.path().join("ledger.db").display());
        let ledger = crate::ledger::open(&url).await.unwrap();
        let publisher = Publisher::spawn(
            &"amqp://127.0.0.1:1/%2f".parse().unwrap(),
            ledger.clone(),
            Duration::ZERO,
            CancellationToken::new(),
        );
        let ticker = |since: Option<Timestamp>| Ticker {
            ledger: ledger.clone(),
            events: Events::spawn(publisher.clone()),
            watch: Watch { since, last: since },
            unreadable: HashSet::new(),
        };
        let name = ScheduleName::parse("a").unwrap();
        let definition = Definition { cron: "* * * * * *".to_owned(), catch_up: CatchUp::None, ..definition() };
        let (now, _) = ledger.schedule(name.clone()).await.unwrap();
        let tick = timestamp(now.as_millisecond() / 1_000 * 1_000 - 1_000);
        ledger.change_schedule(anew("a", definition, NextTick::At(tick))).await.unwrap();
        let stands = async || ledger.schedule(name.clone()).await.unwrap().1.unwrap();

        let mut young = ticker(None);
        young.round().await.unwrap();
        assert_eq!((stands().await.next_at, stands().await.ticks), (Some(tick), TickCounts::default()));
        let watching = timestamp(now.as_millisecond() - 3_000);
        ticker(Some(watching)).round().await.unwrap();
        assert!(stands().await.ticks.fired >= 1, "one that has watched fires it: {:?}", stands().await);
        assert_eq!(stands().await.ticks.missed, 0);
    }

    /// As after eight hours ahead and back.
    #[tokio::test]
    async fn ticks_that_a_clock_has_put_far_ahead_are_computed_again() {
        const AHEAD_MS: i64 = 8 * 3_600_000;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ledger.db");
        let ledger = crate::ledger::open(&format!("sqlite://{}", file.display())).await.unwrap();
        let nowhere = "amqp://127.0.0.1:1/%2f".parse().unwrap();
        let publisher = Publisher::spawn(&nowhere, ledger.clone(), Duration::ZERO, CancellationToken::new());
        let events = Events::spawn(publisher);
        let mut ticker = Ticker { ledger: ledger.clone(), events, watch: Watch::default(), unreadable: HashSet::new() };
        let name = ScheduleName::parse("a").unwrap();
        let definition = Definition { cron: "0 * * * * *".to_owned(), ..definition() };
        let stands = async || ledger.schedule(name.clone()).await.unwrap();
        let (now, _) = stands().await;
        let far = timestamp((now.as_millisecond() + AHEAD_MS) / 60_000 * 60_000 + 60_000);
        ledger.change_schedule(anew("a", definition, NextTick::At(far))).await.unwrap();
        ticker.round().await.unwrap();
        assert_eq!(stands().await.1.unwrap().next_at, Some(far), "whoever has set it so by a right clock has meant it");

        let planned = format!("UPDATE schedules SET planned_at = planned_at + {AHEAD_MS}");
        rusqlite::Connection::open(&file).unwrap().execute(&planned, []).unwrap();
        ticker.round().await.unwrap();
        let (now, schedule) = stands().await;
        let schedule = schedule.unwrap();
        let wait = schedule.next_at.unwrap().as_millisecond() - now.as_millisecond();
        assert!((-60_000..=60_000).contains(&wait), "{schedule:?}");
        assert_eq!(ledger.due_schedules(10).await.unwrap().ahead, []);
        assert_eq!(schedule.ticks, TickCounts::default());
    }

    #[test]
    fn a_gap_or_a_jump_of_the_clock_begins_a_new_watch() {
        let at = timestamp;
        let mut watch = Watch::default();
        assert_eq!(watch.look(at(1_000)), at(1_000));
        assert_eq!(watch.look(at(2_000)), at(1_000));
        assert_eq!(watch.look(at(7_000)), at(1_000));
        assert_eq!(watch.look(at(12_001)), at(12_001), "it was frozen");
        assert_eq!(watch.look(at(12_100)), at(12_001));
        assert_eq!(watch.look(at(9_000)), at(9_000), "the clock was set back");
        assert_eq!(watch.look(at(9_100)), at(9_000));
    }
}
