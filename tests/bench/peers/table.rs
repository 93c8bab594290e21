//! The table of results, with the goals and whether they are met.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Which of two figures is better.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// The columns from left to right: general-purpose proxies, then ghostunnel, which is for mutual TLS only, then
/// pintle.
pub(crate) const GENERAL: [&str; 3] = ["nginx", "haproxy", "stunnel"];
pub(crate) const GHOSTUNNEL: &str = "ghostunnel";
pub(crate) const PINTLE: &str = "pintle";
pub(crate) const PINTLE_TOKEN: &str = "pintle SoftHSM2";
pub(crate) const PINTLE_HYBRID: &str = "pintle hybrid";
pub(crate) const PINTLE_OTHER: &str = "pintle other";

struct Row {
    group: String,
    title: &'static str,
    goal: Goal,
    /// Each proxy's figures, one per round.
    figures: BTreeMap<&'static str, Vec<f64>>,
}

/// pintle's goal in a row.
#[derive(Clone, Copy)]
pub(crate) struct Goal {
    pub(crate) better: Better,
    /// The ratio to the best general-purpose proxy.
    pub(crate) ratio: f64,
    /// The ratio of pintle with a key in a token to pintle with a key in a file.
    pub(crate) in_token: Option<f64>,
}

impl Goal {
    pub(crate) const fn lower(ratio: f64) -> Self {
        Self { better: Better::Lower, ratio, in_token: None }
    }

    pub(crate) const fn higher(ratio: f64) -> Self {
        Self { better: Better::Higher, ratio, in_token: None }
    }
}

/// The rows, in the order in which they were first added.
#[derive(Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    /// Adds a proxy's figure of the current round.
    pub(crate) fn add(&mut self, group: &str, title: &'static str, goal: Goal, proxy: &'static str, figure: f64) {
        let place = self.0.iter().position(|row| row.group == group && row.title == title).unwrap_or_else(|| {
            self.0.push(Row { group: group.to_owned(), title, goal, figures: BTreeMap::new() });
            self.0.len() - 1
        });
        self.0[place].figures.entry(proxy).or_default().push(figure);
    }

    /// Formats the table, group by group.
    pub(crate) fn print(&self) -> String {
        let mut text = String::new();
        let mut groups: Vec<&str> = Vec::new();
        for row in &self.0 {
            if !groups.contains(&row.group.as_str()) {
                groups.push(&row.group);
            }
        }
        let columns = GENERAL.into_iter().chain([GHOSTUNNEL, PINTLE, PINTLE_TOKEN, PINTLE_HYBRID, PINTLE_OTHER]);
        let columns = columns.filter(|column| self.0.iter().any(|row| row.figures.contains_key(column)));
        for group in groups {
            let _ = write!(text, "\n{group:<36}");
            for column in columns.clone() {
                let _ = write!(text, "{:>11}", column.rsplit(' ').next().unwrap_or_default());
            }
            let _ = writeln!(text, "{:>8}{:>6}", "ratio", "goal");
            for row in self.0.iter().filter(|row| row.group == group) {
                let _ = write!(text, "{:<36}", row.title);
                for column in columns.clone() {
                    let _ = match row.median(column) {
                        Some(figure) => write!(text, "{:>11}", shown(figure)),
                        None => write!(text, "{:>11}", "-"),
                    };
                }
                text += &row.verdict();
                text.push('\n');
            }
        }
        text
    }
}

impl Row {
    fn median(&self, proxy: &str) -> Option<f64> {
        self.figures.get(proxy).map(|figures| median(figures.clone()))
    }

    fn is_better(&self, one: f64, other: f64) -> bool {
        match self.goal.better {
            Better::Lower => one <= other,
            Better::Higher => one >= other,
        }
    }

    /// The best of these proxies by median.
    fn best(&self, of: &[&'static str]) -> Option<&'static str> {
        let known = of.iter().filter_map(|proxy| Some((*proxy, self.median(proxy)?)));
        known.reduce(|one, other| if self.is_better(one.1, other.1) { one } else { other }).map(|(proxy, _)| proxy)
    }

    /// The ratio, the goal, whether it is met, and whether pintle leads the row.
    fn verdict(&self) -> String {
        let (Some(best), Some(own)) = (self.best(&GENERAL), self.figures.get(PINTLE)) else { return String::new() };
        let ratio = ratio(own, &self.figures[best]);
        let met = |met: bool| if met { "met" } else { "MISSED" };
        let mut verdict =
            format!("{ratio:>8.2}{:>6.2}  {}", self.goal.ratio, met(self.is_better(ratio, self.goal.ratio)));
        let first = self.best(&[GENERAL.as_slice(), &[GHOSTUNNEL, PINTLE]].concat());
        if let Some(first) = first.filter(|first| *first != PINTLE) {
            let _ = write!(verdict, ", {first} leads");
        }
        if let (Some(goal), Some(in_token)) = (self.goal.in_token, self.figures.get(PINTLE_TOKEN)) {
            let of_own = self::ratio(in_token, own);
            let _ =
                write!(verdict, "; SoftHSM2 {of_own:.2} of it, goal {goal:.2} {}", met(self.is_better(of_own, goal)));
        }
        verdict
    }
}

/// The median of the ratios of two proxies' figures in the same round: other load on the machine lasts longer than a
/// round.
fn ratio(one: &[f64], other: &[f64]) -> f64 {
    median(one.iter().zip(other).map(|(one, other)| one / other).collect())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 { figures[middle] } else { f64::midpoint(figures[middle - 1], figures[middle]) }
}

/// At least three digits.
fn shown(figure: f64) -> String {
    match figure.abs() {
        large if large >= 100.0 => format!("{figure:.0}"),
        middle if middle >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}
