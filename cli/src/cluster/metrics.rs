//! Reads what node proxies and the controller say on `/metrics`.

use std::collections::BTreeMap;

/// A series: name and labels.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Series {
    pub(super) name: String,
    pub(super) labels: BTreeMap<String, String>,
}

/// Values of series at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Metrics(BTreeMap<Series, f64>);

impl Series {
    /// The label's value, empty without one.
    pub(super) fn label(&self, name: &str) -> &str {
        self.labels.get(name).map_or("", String::as_str)
    }
}

impl Metrics {
    /// Reads the text format. Lines it does not understand are left out.
    pub(super) fn parse(text: &str) -> Self {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        Self(lines.filter_map(sample).collect())
    }

    /// The series of one name.
    pub(super) fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a Series, f64)> {
        (self.0.iter())
            .filter(move |(series, _)| series.name == name)
            .map(|(series, value)| (series, *value))
    }

    /// How much each counter has grown since `earlier`. One that is smaller now began anew.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        let grown = |(series, now): (&Series, &f64)| {
            let before = earlier.0.get(series).copied().unwrap_or(0.0);
            let growth = if *now < before { *now } else { now - before };
            (series.clone(), growth)
        };
        Self(self.0.iter().map(grown).collect())
    }

    /// Adds another process's.
    pub(super) fn add(&mut self, other: Self) {
        for (series, value) in other.0 {
            *self.0.entry(series).or_default() += value;
        }
    }
}

/// `name{label="value",...} number`, with an optional timestamp or exemplar behind.
fn sample(line: &str) -> Option<(Series, f64)> {
    let end = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(end);
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, value) = rest.split_once("=\"")?;
            let (value, behind) = quoted(value)?;
            labels.insert(label.to_owned(), value);
            rest = behind.strip_prefix(',').unwrap_or(behind);
        }
        rest = &rest[1..];
    }
    let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
    let name = name.to_owned();
    Some((Series { name, labels }, value))
}

/// What is before the closing quote, and what is behind it.
fn quoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                other => other,
            }),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_labels_and_values_are_read() {
        let text = "# TYPE a counter\na_total{x=\"1\",y=\"a \\\"b\\\\, }\"} 3 1700000000\nb 0.5\nbroken{x=\"1\nc{} 7\n";
        let metrics = Metrics::parse(text);
        let all: Vec<_> = ["a_total", "b", "c", "broken"]
            .into_iter()
            .flat_map(|name| metrics.named(name))
            .map(|(series, value)| (series.label("y").to_owned(), value))
            .collect();
        let expected = [("a \"b\\, }", 3.0), ("", 0.5), ("", 7.0)];
        assert_eq!(
            all,
            expected.map(|(label, value)| (label.to_owned(), value))
        );
    }

    #[test]
    fn growth_survives_a_restart_and_processes_add_up() {
        let before = Metrics::parse("a 5\nb 9\n");
        let mut grown = Metrics::parse("a 7\nb 2\nc 1\n").since(&before);
        assert_eq!(grown, Metrics::parse("a 2\nb 2\nc 1\n"));
        grown.add(Metrics::parse("a 1\nd 4\n"));
        assert_eq!(grown, Metrics::parse("a 3\nb 2\nc 1\nd 4\n"));
    }
}
