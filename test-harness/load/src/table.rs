//! The table of the comparison: ours, the baseline's, and what is aimed at.

/// What a figure of ours is to be at most.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Target {
    /// So many times the baseline's.
    Ratio(f64),
    /// So much.
    Most(f64),
    /// The baseline's and so much more.
    Above(f64),
}

/// One figure of both; the baseline's may be absent, as NaN.
#[derive(Debug)]
pub(crate) struct Row {
    what: String,
    ours: f64,
    baseline: f64,
    target: Target,
}

impl Row {
    pub(crate) fn new(what: String, ours: f64, baseline: f64, target: Target) -> Self {
        Self { what, ours, baseline, target }
    }

    fn cells(&self) -> [String; 6] {
        let Self { what, ours, baseline, target } = self;
        let ratio = ours / baseline;
        let (aim, is_met) = match *target {
            Target::Ratio(most) => (format!("{most} x"), ratio <= most),
            Target::Most(most) => (format!("{most}"), *ours <= most),
            Target::Above(more) => (format!("+ {more}"), *ours <= baseline + more),
        };
        let met = if is_met { "yes" } else { "no" };
        [what.clone(), figure(*ours), figure(*baseline), figure(ratio), aim, met.to_owned()]
    }
}

/// With as many places as its size needs; a dash where there is none.
fn figure(value: f64) -> String {
    if value.is_nan() {
        return "-".to_owned();
    }
    if value.abs() < 10.0 { format!("{value:.2}") } else { format!("{value:.1}") }
}

/// Prints the rows in columns.
pub(crate) fn print(baseline: &str, rows: &[Row]) {
    let heading = ["both hops of ours", "ours", baseline, "ratio", "target: at most", "met"];
    let mut lines = vec![heading.map(str::to_owned)];
    lines.extend(rows.iter().map(Row::cells));
    let widths: Vec<usize> =
        (0..6).map(|n| lines.iter().map(|line| line[n].chars().count()).max().unwrap_or(0)).collect();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .enumerate()
            .map(
                |(n, (cell, width))| {
                    if n == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
                },
            )
            .collect();
        println!("| {} |", cells.join(" | "));
    }
}
