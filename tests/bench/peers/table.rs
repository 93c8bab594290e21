//! What was measured, what it was to be, and which is which.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Which of two figures is the better one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Better {
    Lower,
    Higher,
}

/// The columns, from left to right: proxies for any purpose, then ghostunnel, which is for mutual TLS alone, then pintle.
pub(crate) const GENERAL: [&str; 3] = ["nginx", "haproxy", "stunnel"];
pub(crate) const GHOSTUNNEL: &str = "ghostunnel";
pub(crate) const PINTLE: &str = "pintle";
pub(crate) const PINTLE_TOKEN: &str = "pintle SoftHSM2";
pub(crate) const PINTLE_HYBRID: &str = "pintle hybrid";
pub(crate) const PINTLE_OTHER: &str = "pintle other";

struct Row {
    group: String,
    title: &'static str,
    aim: Aim,
    /// For each proxy, a figure for each round.
    figures: BTreeMap<&'static str, Vec<f64>>,
}

/// What pintle is to reach in a row.
#[derive(Clone, Copy)]
pub(crate) struct Aim {
    pub(crate) better: Better,
    /// The ratio to the best proxy for any purpose.
    pub(crate) ratio: f64,
    /// The ratio of pintle with its key in a token to pintle with its key in a file.
    pub(crate) in_token: Option<f64>,
}

impl Aim {
    pub(crate) const fn lower(ratio: f64) -> Self {
        Self { better: Better::Lower, ratio, in_token: None }
    }

    pub(crate) const fn higher(ratio: f64) -> Self {
        Self { better: Better::Higher, ratio, in_token: None }
    }
}

/// All rows, in the order in which their first figures came.
#[derive(Default)]
pub(crate) struct Table(Vec<Row>);

impl Table {
    /// Adds a proxy's figure of this round.
    pub(crate) fn add(&mut self, group: &str, title: &'static str, aim: Aim, proxy: &'static str, figure: f64) {
        let place = self.0.iter().position(|row| row.group == group && row.title == title).unwrap_or_else(|| {
            self.0.push(Row { group: group.to_owned(), title, aim, figures: BTreeMap::new() });
            self.0.len() - 1
        });
        self.0[place].figures.entry(proxy).or_default().push(figure);
    }

    /// The table, a group after the other.
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
            let _ = writeln!(text, "{:>8}{:>6}", "ratio", "aim");
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
        match self.aim.better {
            Better::Lower => one <= other,
            Better::Higher => one >= other,
        }
    }

    /// The best of these proxies by its median.
    fn best(&self, of: &[&'static str]) -> Option<&'static str> {
        let known = of.iter().filter_map(|proxy| Some((*proxy, self.median(proxy)?)));
        known.reduce(|one, other| if self.is_better(one.1, other.1) { one } else { other }).map(|(proxy, _)| proxy)
    }

    /// The ratio, the aim, and whether it is met and the row led.
    fn verdict(&self) -> String {
        let (Some(best), Some(own)) = (self.best(&GENERAL), self.figures.get(PINTLE)) else { return String::new() };
        let ratio = ratio(own, &self.figures[best]);
        let met = |met: bool| if met { "met" } else { "MISSED" };
        let mut verdict =
            format!("{ratio:>8.2}{:>6.2}  {}", self.aim.ratio, met(self.is_better(ratio, self.aim.ratio)));
        let first = self.best(&[GENERAL.as_slice(), &[GHOSTUNNEL, PINTLE]].concat());
        if let Some(first) = first.filter(|first| *first != PINTLE) {
            let _ = write!(verdict, ", {first} leads");
        }
        if let (Some(aim), Some(in_token)) = (self.aim.in_token, self.figures.get(PINTLE_TOKEN)) {
            let of_own = self::ratio(in_token, own);
            let _ = write!(verdict, "; SoftHSM2 {of_own:.2} of it, aim {aim:.2} {}", met(self.is_better(of_own, aim)));
        }
        verdict
    }
}

/// The median of one proxy's figures as parts of another's in the same round: whatever else the machine does lasts for
/// longer than one.
fn ratio(one: &[f64], other: &[f64]) -> f64 {
    median(one.iter().zip(other).map(|(one, other)| one / other).collect())
}

fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    if figures.len() % 2 == 1 { figures[middle] } else { f64::midpoint(figures[middle - 1], figures[middle]) }
}

/// Three digits or more.
fn shown(figure: f64) -> String {
    match figure.abs() {
        large if large >= 100.0 => format!("{figure:.0}"),
        middle if middle >= 10.0 => format!("{figure:.1}"),
        _ => format!("{figure:.2}"),
    }
}
