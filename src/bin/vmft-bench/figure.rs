//! A figure: what was promised, what was measured, and whether that is enough.

use serde::Serialize;

/// What was promised.
#[expect(clippy::enum_variant_names, reason = "a goal reads as `at least` or `at most`")]
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Goal {
    /// The median is no less.
    AtLeast(f64),
    /// The median is no more.
    AtMost(f64),
    /// The median and the worst are no more.
    AtMostWorst {
        /// Bound of the median.
        median: f64,
        /// Bound of the worst.
        worst: f64,
    },
}

/// One row of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What was measured.
    pub name: &'static str,
    /// Its unit.
    pub unit: &'static str,
    /// What was promised.
    pub goal: Goal,
    /// Median of the samples.
    pub median: f64,
    /// The sample furthest on the bad side.
    pub worst: f64,
    /// How many samples.
    pub n: usize,
    /// True if the goal is met.
    pub pass: bool,
    /// The samples, in the order they were taken.
    pub samples: Vec<f64>,
    /// Whatever helps to understand them.
    pub note: String,
    /// The host's load average when the last sample had been taken.
    pub load: f64,
}

/// The median of `samples`; of an even number, the upper of the two in the middle.
pub fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Figure {
    /// Judges samples. None at all is a miss.
    pub fn new(
        name: &'static str,
        unit: &'static str,
        goal: Goal,
        samples: Vec<f64>,
        note: String,
    ) -> Self {
        let extreme = |pick: fn(f64, f64) -> f64| samples.iter().copied().reduce(pick);
        let worst = match goal {
            Goal::AtLeast(_) => extreme(f64::min),
            Goal::AtMost(_) | Goal::AtMostWorst { .. } => extreme(f64::max),
        };
        let (median, worst) = (median(&samples), worst.unwrap_or(f64::NAN));
        let pass = match goal {
            Goal::AtLeast(bound) => median >= bound,
            Goal::AtMost(bound) => median <= bound,
            Goal::AtMostWorst { median: middle, worst: end } => median <= middle && worst <= end,
        };
        let (n, load) = (samples.len(), crate::host::load());
        Self { name, unit, goal, median, worst, n, pass, samples, note, load }
    }

    /// The table's head.
    pub fn head() -> String {
        format!(
            "{:<34} {:>16} {:>10} {:>10} {:>4}  {:<4}  note",
            "figure", "goal", "median", "worst", "n", ""
        )
    }

    /// The figure's line in the table.
    pub fn line(&self) -> String {
        let goal = match self.goal {
            Goal::AtLeast(bound) => format!("at least {bound}"),
            Goal::AtMost(bound) => format!("at most {bound}"),
            Goal::AtMostWorst { median, worst } => format!("at most {median}/{worst}"),
        };
        let name = format!("{}, {}", self.name, self.unit);
        let verdict = if self.pass { "pass" } else { "MISS" };
        format!(
            "{name:<34} {goal:>16} {:>10.3} {:>10.3} {:>4}  {verdict:<4}  {}",
            self.median, self.worst, self.n, self.note
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judged(goal: Goal, samples: &[f64]) -> (f64, f64, bool) {
        let figure = Figure::new("x", "s", goal, samples.to_vec(), String::new());
        (figure.median, figure.worst, figure.pass)
    }

    #[test]
    fn the_worst_is_on_the_goal_s_bad_side_and_the_median_decides() {
        let samples = [3.0, 1.0, 2.0];
        assert_eq!(judged(Goal::AtLeast(2.0), &samples), (2.0, 1.0, true));
        assert_eq!(judged(Goal::AtLeast(2.5), &samples), (2.0, 1.0, false));
        assert_eq!(judged(Goal::AtMost(2.0), &samples), (2.0, 3.0, true));
        assert_eq!(judged(Goal::AtMost(1.5), &samples), (2.0, 3.0, false));
    }

    #[test]
    fn a_goal_with_two_bounds_is_missed_by_either() {
        let goal = |median, worst| Goal::AtMostWorst { median, worst };
        assert!(judged(goal(2.0, 3.0), &[3.0, 1.0, 2.0]).2);
        assert!(!judged(goal(2.0, 2.5), &[3.0, 1.0, 2.0]).2);
        assert!(!judged(goal(1.5, 3.0), &[3.0, 1.0, 2.0]).2);
    }

    #[test]
    fn a_figure_without_samples_is_a_miss() {
        assert!(!judged(Goal::AtMost(1.0), &[]).2);
        assert!(!judged(Goal::AtLeast(1.0), &[]).2);
    }
}
