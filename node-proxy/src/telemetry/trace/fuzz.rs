//! `traceparent` and `tracestate`, by the grammar of W3C Trace Context.

use http::HeaderMap;

use super::context::{TRACEPARENT, TRACESTATE, TraceContext, state};

/// The first line is the parent, the others are the state.
pub(crate) fn context(bytes: &[u8]) {
    let mut headers = HeaderMap::new();
    let mut lines = bytes.split(|b| *b == b'\n');
    let parent = lines.next().unwrap_or_default();
    if let Ok(value) = http::HeaderValue::from_bytes(parent) {
        headers.insert(TRACEPARENT, value);
    }
    for line in lines.take(8) {
        if let Ok(value) = http::HeaderValue::from_bytes(line) {
            headers.append(TRACESTATE, value);
        }
    }
    if let Some(context) = TraceContext::of(&headers) {
        let lower = |b: &u8| b.is_ascii_digit() || (b'a'..=b'f').contains(b);
        let fields: Vec<_> = parent[..55].split(|b| *b == b'-').collect();
        assert_eq!(
            fields.iter().map(|f| f.len()).collect::<Vec<_>>(),
            [2, 32, 16, 2]
        );
        assert!(fields.iter().all(|field| field.iter().all(lower)));
        assert!(fields[0] != b"ff" && (fields[0] != b"00" || parent.len() == 55));
        headers.insert(TRACEPARENT, context.header());
        assert_eq!(TraceContext::of(&headers), Some(context));
        let child = context.child();
        assert_eq!(
            (child.trace_id, child.flags()),
            (context.trace_id, context.flags())
        );
    }
    if let Some(state) = state(&headers) {
        let members: Vec<_> = state
            .split(',')
            .map(str::trim)
            .filter(|m| !m.is_empty())
            .collect();
        assert!(members.len() <= 32);
        let mut keys = std::collections::HashSet::new();
        for member in members {
            let (key, value) = member.split_once('=').expect("key and value");
            assert!((1..=256).contains(&key.len()) && (1..=256).contains(&value.len()));
            assert!(
                value
                    .bytes()
                    .all(|b| (b' '..=b'~').contains(&b) && b != b'=')
            );
            assert!(keys.insert(key), "{key} is there twice");
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let many: Vec<String> = (0..33).map(|i| format!("k{i}=1")).collect();
    vec![
        format!("{PARENT}\nrojo=00f067aa0ba902b7,congo=t61rcWkgMzE").into_bytes(),
        format!("{PARENT}\nfoo=1 , \t bar=2,\n1a-2@v=x y").into_bytes(),
        format!("{PARENT}\n{}", many.join(",")).into_bytes(),
        b"cc-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-what-the-future-brings".to_vec(),
        b"00-00000000000000000000000000000000-00f067aa0ba902b7-01\nfoo=1,foo=2".to_vec(),
    ]
}
