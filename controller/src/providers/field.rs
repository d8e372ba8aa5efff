//! Places in an object: which field a mistake is about.

/// One step from a value to one inside it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// A path and what was expected there.
pub(crate) type Found = (Vec<Step>, String);

/// A path in an object.
macro_rules! steps {
    ($($step:expr),* $(,)?) => { vec![$($crate::providers::field::Step::from($step)),*] };
}
pub(crate) use steps;

impl From<&str> for Step {
    fn from(key: &str) -> Self {
        Step::Key(key.into())
    }
}

impl From<usize> for Step {
    fn from(index: usize) -> Self {
        Step::Index(index)
    }
}

/// Writes a path for a reader: `spec.ports[0].port`, `metadata.annotations["example.com/x"]`.
pub(crate) fn display(path: &[Step]) -> String {
    let mut text = String::new();
    for step in path {
        match step {
            Step::Index(i) => text.push_str(&format!("[{i}]")),
            Step::Key(k) if k.contains(['.', '/', '[']) => text.push_str(&format!("[{k:?}]")),
            Step::Key(k) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(k);
            }
        }
    }
    text
}

/// A path below another.
pub(crate) fn below(at: &[Step], path: Vec<Step>) -> Vec<Step> {
    at.iter().cloned().chain(path).collect()
}

/// Collects mistakes below one place, so that checks name only what is theirs.
pub(crate) struct Report<'a> {
    at: Vec<Step>,
    found: &'a mut Vec<Found>,
}

impl<'a> Report<'a> {
    pub(crate) fn new(at: Vec<Step>, found: &'a mut Vec<Found>) -> Self {
        Self { at, found }
    }

    /// The same, one or more steps further down.
    pub(crate) fn at(&mut self, path: Vec<Step>) -> Report<'_> {
        Report {
            at: below(&self.at, path),
            found: self.found,
        }
    }

    /// Something is wrong at `path`; empty for the place itself.
    pub(crate) fn say(&mut self, path: Vec<Step>, message: impl Into<String>) {
        self.found.push((below(&self.at, path), message.into()));
    }
}
