//! From text to typed objects, with every mistake and its place.
//!
//! Documents of a file are cut apart before they are parsed, so that broken YAML in one costs only that one.
//! A document is parsed to a tree first, because the tree tells what Kubernetes would refuse and a
//! direct read would let pass: numbers where strings belong, and fields that do not exist.

use std::path::Path;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_norway::Value;

use super::locate::{Format, line_of};
use super::{Document, Mistake, Object, ObjectKey, Parsed};
use crate::providers::check;
use crate::providers::field::{Step, display};
use crate::providers::gateway::Custom;
use crate::providers::object::KINDS;

/// Reads the documents in `text`; `path` only names the file in mistakes and tells JSON by its ending.
pub fn parse_text(path: &Path, text: &str) -> Parsed {
    let file: Arc<Path> = path.into();
    let mut parsed = Parsed::default();
    let json = path.extension().is_some_and(|e| e == "json");
    let chunks = if json {
        vec![(1, text)]
    } else {
        split_documents(text)
    };
    for (line, chunk) in chunks {
        let mut source = Source {
            file: &file,
            first_line: line,
            text: chunk,
            format: if json { Format::Json } else { Format::Yaml },
            object: None,
            mistakes: &mut parsed.mistakes,
        };
        if let Some(value) = source.tree() {
            source.objects(value, &mut Vec::new(), &mut parsed.documents);
        }
    }
    parsed.mistakes.sort();
    parsed
}

/// Cuts YAML text at its document markers: line number of the first line, text. A marker at the start of
/// a line can be nothing else (YAML 1.2, section 9.1.2).
fn split_documents(text: &str) -> Vec<(usize, &str)> {
    let mut documents = Vec::new();
    let (mut start, mut start_line) = (0, 1);
    let mut offset = 0;
    // Comments and directives (`%YAML`) before a marker belong to the document after it.
    let mut begun = false;
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let marker = line
            .strip_prefix("---")
            .is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if marker && begun {
            documents.push((start_line, &text[start..offset]));
            (start, start_line) = (offset, number + 1);
        }
        begun |= !line.trim().is_empty() && !line.starts_with(['#', '%']);
        offset += line.len();
    }
    documents.push((start_line, &text[start..]));
    documents
}

/// One document's text, and where to report what is wrong with it.
struct Source<'a> {
    file: &'a Arc<Path>,
    first_line: usize,
    text: &'a str,
    format: Format,
    object: Option<ObjectKey>,
    mistakes: &'a mut Vec<Mistake>,
}

impl Source<'_> {
    fn mistake(&mut self, path: &[Step], message: impl Into<String>) {
        let line = line_of(self.text, self.format, path).unwrap_or(1);
        self.mistakes.push(Mistake {
            file: self.file.to_path_buf(),
            line: self.first_line + line - 1,
            object: self.object.clone(),
            field: display(path),
            message: message.into(),
        });
    }

    fn tree(&mut self) -> Option<Value> {
        let (line, message) = match self.format {
            Format::Yaml => match serde_norway::from_str::<Value>(self.text) {
                Ok(mut value) => match value.apply_merge() {
                    Ok(()) => return Some(value),
                    Err(e) => (1, e.to_string()),
                },
                Err(e) => (e.location().map_or(1, |l| l.line()), e.to_string()),
            },
            Format::Json => match serde_json::from_str::<Value>(self.text) {
                Ok(value) => return Some(value),
                Err(e) => (e.line().max(1), e.to_string()),
            },
        };
        self.mistakes.push(Mistake {
            file: self.file.to_path_buf(),
            line: self.first_line + line - 1,
            object: None,
            field: String::new(),
            message: format!("cannot be parsed: {message}"),
        });
        None
    }

    /// Reads the object in `value`, which lies at `at` in the document; a `List` holds several.
    fn objects(&mut self, value: Value, at: &mut Vec<Step>, documents: &mut Vec<Document>) {
        if value.is_null() {
            return;
        }
        self.object = None;
        let Some(kind) = value.get("kind").and_then(Value::as_str).map(str::to_owned) else {
            self.mistake(
                &child(at, "kind"),
                "expected the kind of the object, such as Pod",
            );
            return;
        };
        let api_version = value.get("apiVersion").and_then(Value::as_str);
        if kind == "List" && api_version == Some("v1") {
            let Some(Value::Sequence(items)) = value.get("items").cloned() else {
                self.mistake(&child(at, "items"), "expected a list of objects");
                return;
            };
            for (i, item) in items.into_iter().enumerate() {
                at.extend([Step::Key("items".into()), Step::Index(i)]);
                self.objects(item, at, documents);
                at.truncate(at.len() - 2);
            }
            return;
        }
        let Some((_, versions, namespaced)) = KINDS.into_iter().find(|k| k.0 == kind) else {
            tracing::debug!(file = %self.file.display(), kind, "kind is not used, skipped");
            return;
        };
        let group = |version: &str| version.rsplit_once('/').map_or("", |(g, _)| g).to_owned();
        if api_version.is_some_and(|v| group(v) != group(versions[0])) {
            // Another API group's kind of the same name.
            tracing::debug!(file = %self.file.display(), kind, api_version, "kind is not used, skipped");
            return;
        }
        let text_at = |key: &str| {
            let value = value.get("metadata").and_then(|m| m.get(key));
            value.and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let (mut namespace, name) = (text_at("namespace"), text_at("name"));
        if namespaced && namespace.is_empty() {
            namespace = "default".into();
        }
        self.object = Some(ObjectKey {
            kind: kind.clone(),
            namespace: if namespaced { namespace } else { String::new() },
            name,
        });
        let before = self.mistakes.len();
        if api_version.is_none_or(|v| !versions.contains(&v)) {
            let wanted = versions.join(" or ");
            self.mistake(&child(at, "apiVersion"), format!("expected {wanted}"));
            return;
        }
        let object = match &*kind {
            "Namespace" => self.typed(value, at).map(Object::Namespace),
            "ServiceAccount" => self.typed(value, at).map(Object::ServiceAccount),
            "Node" => self.typed(value, at).map(Object::Node),
            "Pod" => self.typed(value, at).map(Object::Pod),
            "Deployment" => self.typed(value, at).map(Object::Deployment),
            "Service" => self.typed(value, at).map(Object::Service),
            "EndpointSlice" => self.typed(value, at).map(Object::EndpointSlice),
            "HTTPRoute" => self.typed(value, at).map(Object::HttpRoute),
            "GRPCRoute" => self.typed(value, at).map(Object::GrpcRoute),
            "TLSRoute" => self.typed(value, at).map(Object::TlsRoute),
            "TCPRoute" => self.typed(value, at).map(Object::TcpRoute),
            "XBackendTrafficPolicy" => self.typed(value, at).map(Object::BackendTrafficPolicy),
            "TrafficPolicy" => self.typed(value, at).map(Object::TrafficPolicy),
            // KINDS was searched above.
            _ => None,
        };
        let Some(object) = object else { return };
        // A field that was taken out above must not be missed as well.
        let told: Vec<String> = self.mistakes[before..]
            .iter()
            .map(|m| m.field.clone())
            .collect();
        for (field, message) in check::mistakes(&object) {
            let path: Vec<Step> = at.iter().cloned().chain(field).collect();
            let field = display(&path);
            if !told
                .iter()
                .any(|t| t.starts_with(&field) || field.starts_with(t))
            {
                self.mistake(&path, message);
            }
        }
        if self.mistakes.len() == before {
            let line = line_of(self.text, self.format, at).unwrap_or(1);
            documents.push(Document {
                object,
                file: self.file.clone(),
                line: self.first_line + line - 1,
            });
        }
    }

    /// Reads a tree into a type. Each thing that does not fit is reported, then taken out, and the
    /// rest is read again, so that one reading finds them all.
    fn typed<T: DeserializeOwned + Serialize + Meta>(
        &mut self,
        mut value: Value,
        at: &[Step],
    ) -> Option<Arc<T>> {
        for _ in 0..MAX_MISTAKES {
            let error = match serde_path_to_error::deserialize::<_, T>(value.clone()) {
                Ok(mut object) => {
                    let known = serde_norway::to_value(&object).ok()?;
                    let mut path = at.to_vec();
                    self.unknown_fields(&value, &known, &mut path);
                    if let Some(key) = &self.object
                        && !key.namespace.is_empty()
                    {
                        object.metadata_mut().namespace = Some(key.namespace.clone());
                    }
                    return Some(Arc::new(object));
                }
                Err(error) => error,
            };
            let path: Vec<Step> = error
                .path()
                .iter()
                .filter_map(|segment| match segment {
                    serde_path_to_error::Segment::Seq { index } => Some(Step::Index(*index)),
                    serde_path_to_error::Segment::Map { key } => Some(Step::Key(key.clone())),
                    serde_path_to_error::Segment::Enum { .. }
                    | serde_path_to_error::Segment::Unknown => None,
                })
                .collect();
            if quantity(&mut value, &path) {
                continue;
            }
            let full: Vec<Step> = at.iter().chain(&path).cloned().collect();
            self.mistake(&full, error.inner().to_string());
            if !remove(&mut value, &path) {
                return None;
            }
        }
        None
    }

    /// Reports the fields of `given` that did not make it into `known`: they do not exist. `status` may
    /// come from a newer Kubernetes and is let pass.
    fn unknown_fields(&mut self, given: &Value, known: &Value, path: &mut Vec<Step>) {
        match (given, known) {
            (Value::Mapping(given), Value::Mapping(known)) => {
                for (key, value) in given {
                    let Some(name) = key.as_str() else { continue };
                    if value.is_null() || (name == "status" && path.is_empty()) {
                        continue;
                    }
                    path.push(Step::Key(name.into()));
                    match known.get(name) {
                        Some(inner) => self.unknown_fields(value, inner, path),
                        None => self.mistake(path, "there is no such field"),
                    }
                    path.pop();
                }
            }
            (Value::Sequence(given), Value::Sequence(known)) => {
                for (i, (value, inner)) in given.iter().zip(known).enumerate() {
                    path.push(Step::Index(i));
                    self.unknown_fields(value, inner, path);
                    path.pop();
                }
            }
            _ => {}
        }
    }
}

/// Access to the metadata of a type being read.
trait Meta {
    fn metadata_mut(&mut self) -> &mut ObjectMeta;
}

impl<T: k8s_openapi::Metadata<Ty = ObjectMeta>> Meta for T {
    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        k8s_openapi::Metadata::metadata_mut(self)
    }
}

impl<S> Meta for Custom<S> {
    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

fn child(at: &[Step], key: &str) -> Vec<Step> {
    let mut path = at.to_vec();
    path.push(Step::Key(key.into()));
    path
}

/// Kubernetes takes `cpu: 1` for the quantity "1"; the type wants text. True if that was the case.
fn quantity(value: &mut Value, path: &[Step]) -> bool {
    let parent = path.len().checked_sub(2).and_then(|i| path.get(i));
    let is_quantity = matches!(parent, Some(Step::Key(k)) if QUANTITY_MAPS.contains(&k.as_str()))
        || matches!(path.last(), Some(Step::Key(k)) if k == "sizeLimit");
    match descend(value, path) {
        Some(Value::Number(n)) if is_quantity => {
            let text = n.to_string();
            if let Some(slot) = descend(value, path) {
                *slot = Value::String(text);
            }
            true
        }
        _ => false,
    }
}

/// Takes the value at `path` out of its map. An element of a sequence takes the sequence with it, as
/// the indices of later mistakes would be wrong otherwise.
fn remove(value: &mut Value, path: &[Step]) -> bool {
    let mut path = path;
    while let Some((last, parents)) = path.split_last() {
        if let Step::Key(key) = last
            && let Some(Value::Mapping(map)) = descend(value, parents)
            && map.remove(key.as_str()).is_some()
        {
            return true;
        }
        path = parents;
    }
    false
}

fn descend<'v>(value: &'v mut Value, path: &[Step]) -> Option<&'v mut Value> {
    path.iter().try_fold(value, |value, step| match step {
        Step::Key(k) => value.get_mut(k.as_str()),
        Step::Index(i) => value.get_mut(*i),
    })
}

/// Mistakes of one document that are looked for before giving up on it.
const MAX_MISTAKES: usize = 50;
const QUANTITY_MAPS: [&str; 6] = [
    "limits",
    "requests",
    "overhead",
    "capacity",
    "allocatable",
    "allocatedResources",
];
