//! The line of a field in a manifest's text.
//!
//! Parsed YAML and JSON trees do not carry positions, but the parsers' errors do. So the text is read once
//! more along the path, and the visitor fails on purpose at the field: the error says where that is.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::providers::field::Step;

/// How a document's text is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    Yaml,
    Json,
}

/// The line (from 1) of the value at `path`, or of the deepest value on the way that exists.
pub(super) fn line_of(text: &str, format: Format, path: &[Step]) -> Option<usize> {
    let seed = Walk { path };
    match format {
        Format::Yaml => {
            let error = seed
                .deserialize(serde_norway::Deserializer::from_str(text))
                .err()?;
            error.location().map(|l| l.line())
        }
        Format::Json => {
            let mut deserializer = serde_json::Deserializer::from_str(text);
            let error = seed.deserialize(&mut deserializer).err()?;
            (error.line() > 0).then(|| error.line())
        }
    }
}

struct Walk<'p> {
    path: &'p [Step],
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value at the path")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Some((Step::Key(wanted), rest)) = self.path.split_first() {
            while let Some(key) = map.next_key::<String>()? {
                if key == *wanted {
                    map.next_value_seed(Walk { path: rest })?;
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Err(A::Error::custom("here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        if let Some((Step::Index(wanted), rest)) = self.path.split_first() {
            for _ in 0..*wanted {
                seq.next_element::<IgnoredAny>()?;
            }
            seq.next_element_seed(Walk { path: rest })?;
        }
        Err(A::Error::custom("here"))
    }

    // Scalars: the path ends here, or goes on into something that is not there.
    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_none<E: Error>(self) -> Result<(), E> {
        Err(E::custom("here"))
    }
    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}
