//! The names and versions that a client holds.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::resources::Table;

/// Names and versions.
#[derive(Debug)]
pub(super) enum Sent {
    /// Those of a whole table: no copy for each of a thousand nodes.
    All(Arc<Table>),
    /// Name -> version.
    Some(HashMap<Arc<str>, Arc<str>>),
}

impl Sent {
    pub(super) fn is_empty(&self) -> bool {
        match self {
            Sent::All(table) => table.is_empty(),
            Sent::Some(names) => names.is_empty(),
        }
    }

    /// The version that is held; `None`: none is.
    pub(super) fn version(&self, name: &str) -> Option<&Arc<str>> {
        match self {
            Sent::All(table) => table.get(name).map(|resource| &resource.version),
            Sent::Some(names) => names.get(name),
        }
    }

    pub(super) fn names(&self) -> Box<dyn Iterator<Item = &Arc<str>> + '_> {
        match self {
            Sent::All(table) => Box::new(table.keys()),
            Sent::Some(names) => Box::new(names.keys()),
        }
    }

    /// Takes what was sent. Returns how many names were added or removed by it.
    pub(super) fn update(
        &mut self,
        sent: Vec<(&Arc<str>, &Arc<str>)>,
        removed: &BTreeSet<String>,
    ) -> u64 {
        if sent.is_empty() && removed.is_empty() {
            return 0;
        }
        let names = self.own();
        let mut changed = 0;
        for (name, version) in sent {
            let old = names.insert(name.clone(), version.clone());
            changed += u64::from(old.is_none());
        }
        for name in removed {
            changed += u64::from(names.remove(name.as_str()).is_some());
        }
        changed
    }

    pub(super) fn retain(&mut self, keep: impl Fn(&Arc<str>) -> bool) {
        self.own().retain(|name, _| keep(name));
    }

    fn own(&mut self) -> &mut HashMap<Arc<str>, Arc<str>> {
        if let Sent::All(table) = self {
            let names = table.iter();
            *self = names
                .map(|(name, resource)| (name.clone(), resource.version.clone()))
                .collect();
        }
        match self {
            Sent::Some(names) => names,
            Sent::All(_) => unreachable!("it was just replaced"),
        }
    }
}

impl Default for Sent {
    fn default() -> Self {
        Sent::Some(HashMap::new())
    }
}

impl<N: Into<Arc<str>>, V: Into<Arc<str>>> FromIterator<(N, V)> for Sent {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(all: I) -> Self {
        let all = all.into_iter().map(|(n, v)| (n.into(), v.into()));
        Sent::Some(all.collect())
    }
}
