//! What an operator should know of schedules: which fire nothing, and why.

use jiff::Timestamp;

use super::{Finding, fail, ok, warn};
use crate::api::{Schedule, Unreadable};
use crate::commands::get::made;
use crate::text::{count, relative};

/// How many schedules one finding names.
const NAMED_MAX: usize = 5;
/// How many ticks in a row may be skipped: a run that takes somewhat longer now and then is none to look at.
const SKIPPED_MAX: i64 = 2;
/// How long a tick may be due: every process looks several times a second, and judges within seconds what was missed.
const LATE_MS_MAX: i64 = 60_000;

/// What was seen of all schedules so far; of any number of them it keeps few words.
#[derive(Debug, Default)]
pub(super) struct Seen {
    schedules: u64,
    unreadable: Few,
    endless: Few,
    late: Few,
    blocked: Few,
    paused: Few,
}

/// The first few of many.
#[derive(Debug, Default)]
struct Few {
    told: Vec<String>,
    more: u64,
}

impl Few {
    fn tell(&mut self, words: impl FnOnce() -> String) {
        match self.told.len() < NAMED_MAX {
            true => self.told.push(words()),
            false => self.more += 1,
        }
    }

    /// `None` when there is none.
    fn message(&self) -> Option<String> {
        let more = if self.more > 0 { format!("; and {} more", self.more) } else { String::new() };
        (!self.told.is_empty()).then(|| format!("{}{more}", self.told.join("; ")))
    }
}

impl Seen {
    /// Looks at one.
    pub(super) fn look(&mut self, schedule: &Schedule, now: Timestamp) {
        self.schedules += 1;
        let name = &schedule.name;
        if schedule.paused {
            let paused =
                schedule.paused_at.map(|at| format!(", paused {}", made(at, schedule.paused_by.as_deref(), now)));
            self.paused.tell(|| format!("{name}{}", paused.unwrap_or_default()));
            return;
        }
        let late = |tick: &Timestamp| now.as_millisecond() - tick.as_millisecond() > LATE_MS_MAX;
        if schedule.next_runs.is_empty() {
            self.endless.tell(|| format!("{name} has no next tick ({} in {})", schedule.cron, schedule.timezone));
        } else if let Some(tick) = schedule.next_at.filter(late) {
            self.late.tell(|| format!("{name}: nobody has fired the tick of {}", relative(tick, now)));
        }
        if schedule.skipped_in_a_row > SKIPPED_MAX
            && let Some(task) = &schedule.blocked_by
        {
            let skipped = count(schedule.skipped_in_a_row.unsigned_abs(), "tick");
            self.blocked.tell(|| format!("{name}: {skipped} in a row skipped, since task {task} is unfinished"));
        }
    }

    /// Notes one that the producer cannot read.
    pub(super) fn unreadable(&mut self, Unreadable { name, problem }: &Unreadable) {
        self.schedules += 1;
        self.unreadable.tell(|| format!("{name}: {problem}"));
    }

    /// What is thought of them all.
    pub(super) fn findings(&self) -> Vec<Finding> {
        let told = |few: &Few, finding: &dyn Fn(String) -> Finding| few.message().map(finding);
        let found = [
            told(&self.unreadable, &|message| {
                let advice = "finish the upgrade, or put it anew: tasklane schedules delete NAME, then put";
                fail("schedules.readable", format!("this producer cannot read {message}"), advice)
            }),
            told(&self.endless, &|message| {
                fail("schedules.next", message, "is it of a newer release? tasklane schedules put it anew")
            }),
            told(&self.late, &|message| {
                fail("schedules.fired", message, "are clocks right, and is the ledger slow? tasklane-producer doctor")
            }),
            told(&self.blocked, &|message| {
                warn("schedules.blocked", message, "tasklane get ID; end it, or cancel it, and the next tick is fired")
            }),
            told(&self.paused, &|message| {
                warn(
                    "schedules.paused",
                    message,
                    "tasklane schedules resume NAME, when that is over for which it was paused",
                )
            }),
        ];
        let mut findings: Vec<_> = found.into_iter().flatten().collect();
        if findings.is_empty() {
            findings.push(ok("schedules.next", format!("{} with a next tick", count(self.schedules, "schedule"))));
        }
        findings
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::Verdict;
    use serde_json::{Value, json};

    fn schedule(changes: Value) -> Schedule {
        let mut schedule = json!({
            "name": "s", "cron": "@hourly", "timezone": "UTC", "task": {"kind": "k", "queue": "q", "max_attempts": 1},
            "catch_up": "one", "catch_up_max": 1, "overlap": "skip", "jitter_ms": 0, "paused": false,
            "next_at": "2026-11-23T08:00:00Z", "next_runs": ["2026-11-23T08:00:00Z"],
            "ticks": {"fired": 1, "skipped": 0, "missed": 0}
        });
        for (key, value) in changes.as_object().unwrap() {
            schedule[key] = value.clone();
        }
        serde_json::from_value(schedule).unwrap()
    }

    fn seen(changes: Value) -> Vec<(&'static str, Verdict, String)> {
        let mut seen = Seen::default();
        seen.look(&schedule(changes), "2026-11-23T07:30:00Z".parse().unwrap());
        seen.findings().into_iter().map(|finding| (finding.check, finding.verdict, finding.message)).collect()
    }

    #[test]
    fn what_fires_nothing_is_a_finding() {
        let one = |check, verdict, message: &str| vec![(check, verdict, message.to_owned())];
        assert_eq!(seen(json!({})), one("schedules.next", Verdict::Ok, "1 schedule with a next tick"));
        let paused = json!({"paused": true, "paused_at": "2026-11-20T07:30:00Z", "paused_by": "anna", "next_runs": []});
        assert_eq!(seen(paused), one("schedules.paused", Verdict::Warn, "s, paused by anna, 3d0h ago"));
        assert_eq!(seen(json!({"next_runs": []}))[0].0, "schedules.next");
        assert_eq!(seen(json!({"next_runs": []}))[0].1, Verdict::Fail);
        let late = json!({"next_at": "2026-11-23T07:20:00Z"});
        assert_eq!(seen(late), one("schedules.fired", Verdict::Fail, "s: nobody has fired the tick of 10m0s ago"));
        assert_eq!(seen(json!({"next_at": "2026-11-23T07:29:50Z"}))[0].1, Verdict::Ok);
        let blocked = |row| json!({"skipped_in_a_row": row, "blocked_by": "t-1"});
        let words = "s: 3 ticks in a row skipped, since task t-1 is unfinished";
        assert_eq!(seen(blocked(3)), one("schedules.blocked", Verdict::Warn, words));
        assert_eq!(seen(blocked(2))[0].1, Verdict::Ok);
    }

    #[test]
    fn of_many_a_few_are_named() {
        let mut seen = Seen::default();
        for n in 0..8 {
            seen.unreadable(&Unreadable { name: format!("n{n}"), problem: "bad".to_owned() });
        }
        let [finding] = &seen.findings()[..] else { panic!("one finding") };
        assert!(finding.message.ends_with("n4: bad; and 3 more"), "{finding:?}");
    }
}
