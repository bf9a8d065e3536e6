//! Measurements: each row several times in one run, beside what the broker alone can do on the same machine at the same
//! time, so that the ratios hold where the figures do not.

pub mod cost;
pub mod growth;
pub mod http;
pub mod instructions;
pub mod raw;
pub mod rows;
mod world;

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use serde::Serialize;

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// How often each row is measured.
    pub repeats: usize,
    /// How many tasks one measurement takes; some rows take a part of it.
    pub tasks: usize,
}

/// Says how many bytes of args the tasks of all rows have; once, and before anything is measured.
pub fn with_args_of(bytes: usize) {
    // Said twice, the first counts.
    let _ = world::BYTES.set(bytes);
}

/// Says how many tasks a worker runs at once where a row does not say; once, and before anything is measured.
pub fn with_places(places: usize) {
    // Said twice, the first counts.
    let _ = world::PLACES.set(places);
}

/// What one row has come to.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Its name, such as `e2e batch`.
    pub name: String,
    /// The ledger, where there is one.
    pub ledger: Option<String>,
    /// In what it is measured.
    pub unit: &'static str,
    /// All measurements, in their order.
    pub measured: Vec<f64>,
    /// The middle one.
    pub median: f64,
    /// Half the distance from the lowest to the highest, as a part of the median.
    pub spread: f64,
    /// The median as a part of another row's, which is named.
    pub ratio: Option<(f64, String)>,
}

impl Row {
    /// A row of these measurements.
    #[must_use]
    pub fn of(name: &str, ledger: Option<&str>, unit: &'static str, measured: Vec<f64>) -> Self {
        let mut sorted = measured.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN);
        let width = sorted.last().zip(sorted.first()).map_or(f64::NAN, |(last, first)| last - first);
        let (name, ledger) = (name.to_owned(), ledger.map(str::to_owned));
        Self { name, ledger, unit, measured, median, spread: width / 2.0 / median, ratio: None }
    }

    /// As a part of that row.
    #[must_use]
    pub fn against(mut self, other: &Self) -> Self {
        self.ratio = Some((self.median / other.median, other.name.clone()));
        self
    }
}

/// Measures rows several times, each time anew.
///
/// # Errors
/// Where one measurement fails.
pub async fn repeated(plan: Plan, measure: impl AsyncFn() -> Result<Vec<Row>>) -> Result<Vec<Row>> {
    let mut all: Vec<Row> = measure().await?;
    for _ in 1..plan.repeats {
        for (row, anew) in all.iter_mut().zip(measure().await?) {
            let Row { name, ledger, unit, mut measured, .. } = std::mem::replace(row, anew.clone());
            measured.extend(anew.measured);
            *row = Row::of(&name, ledger.as_deref(), unit, measured);
        }
    }
    Ok(all)
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ledger = self.ledger.as_deref().unwrap_or("-");
        let figure = if self.median < 100.0 { format!("{:.2}", self.median) } else { format!("{:.0}", self.median) };
        write!(f, "{:<14} {ledger:<12} {figure:>10} {:<8} ±{:>3.0} %", self.name, self.unit, self.spread * 100.0)?;
        match &self.ratio {
            Some((ratio, to)) => write!(f, "   {ratio:.2} × {to}"),
            None => Ok(()),
        }
    }
}

/// A part of sorted durations lies below the answer, in milliseconds.
#[must_use]
pub fn percentile(sorted: &[Duration], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    let index = ((last as f64) * part).round() as usize;
    sorted.get(index).map_or(f64::NAN, |time| time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_tells_the_middle_and_the_width() {
        let row = Row::of("a", None, "/s", vec![30.0, 10.0, 20.0]);
        assert_eq!((row.median, row.spread), (20.0, 0.5));
        assert_eq!(row.clone().against(&Row::of("b", None, "/s", vec![40.0])).ratio, Some((0.5, "b".to_owned())));
    }

    #[tokio::test]
    async fn a_row_that_is_measured_again_has_all_its_measurements() {
        let measured = std::cell::Cell::new(0.0);
        let measure = async || {
            measured.set(measured.get() + 1.0);
            Ok(vec![
                Row::of("a", Some("b"), "MB", vec![measured.get()]),
                Row::of("c", None, "s", vec![-measured.get()]),
            ])
        };
        let rows = repeated(Plan { repeats: 3, tasks: 1 }, measure).await.unwrap();
        let told: Vec<_> = rows.iter().map(|row| (row.name.as_str(), row.median, &row.measured[..])).collect();
        assert_eq!(told, [("a", 2.0, &[1.0, 2.0, 3.0][..]), ("c", -2.0, &[-1.0, -2.0, -3.0][..])]);
    }

    #[test]
    fn percentiles_are_of_what_was_measured() {
        let times: Vec<_> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!((percentile(&times, 0.5), percentile(&times, 0.99)), (51.0, 99.0));
    }
}
