//! The kept table: a file that was torn anywhere gives what precedes the tear; a file that was changed gives nothing.

use mesh_api::proto::discovery::{DeltaDiscoveryResponse, Resource};
use prost::Message;

use super::{MAGIC, framed, read_from};
use crate::fuzz::{Input, part};

pub(crate) fn log(bytes: &[u8]) {
    let mut input = Input(bytes);
    let (tear, change) = (input.part(), input.byte());
    // Whatever is there: read or refused, without trusting a length.
    let _ = read_from(bytes, bytes.len() as u64);

    let mut file = MAGIC.to_vec();
    let mut ends = vec![file.len()];
    let mut valid = true;
    while !input.0.is_empty() && ends.len() < 16 {
        let body = input.part();
        valid &= DeltaDiscoveryResponse::decode(body).is_ok();
        file.extend(framed(body));
        ends.push(file.len());
    }
    let whole = responses(&file);
    assert_eq!(whole.is_some(), valid);
    let Some(whole) = whole else { return };

    // Written anew, as it is at every start, it holds the same.
    let mut again = MAGIC.to_vec();
    whole
        .iter()
        .for_each(|response| again.extend(framed(&response.encode_to_vec())));
    assert_eq!(responses(&again).as_ref(), Some(&whole));

    let at = tear
        .iter()
        .fold(0usize, |n, byte| n << 8 | usize::from(*byte))
        % (file.len() + 1);
    let before = ends.iter().rev().find(|end| **end <= at);
    let expected = before.and_then(|end| responses(&file[..*end]));
    assert_eq!(
        responses(&file[..at]),
        expected,
        "torn at {at} of {}",
        file.len()
    );

    if change != 0 && at < file.len() {
        // A changed length makes the rest a torn record, or the sum wrong.
        let mut changed = file.clone();
        changed[at] ^= change;
        let begun = before.and_then(|end| responses(&file[..*end]));
        let read = responses(&changed);
        assert!(read.is_none() || read == begun, "changed at {at}");
    }
}

fn responses(file: &[u8]) -> Option<Vec<DeltaDiscoveryResponse>> {
    read_from(file, file.len() as u64)
        .ok()
        .map(|(held, _)| held.into_responses())
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let response = |version: &str, names: &[&str], removed: &[&str]| {
        let response = DeltaDiscoveryResponse {
            system_version_info: version.into(),
            type_url: "type.googleapis.com/warren.mesh.v1.Service".into(),
            resources: names
                .iter()
                .map(|name| Resource {
                    name: (*name).into(),
                    version: "1".into(),
                    ..Default::default()
                })
                .collect(),
            removed_resources: removed.iter().map(|name| (*name).into()).collect(),
            ..Default::default()
        };
        part(&response.encode_to_vec())
    };
    let (a, b) = (
        response("", &["a", "b"], &[]),
        response("x+", &["b", "c"], &["a"]),
    );
    vec![
        [&[0, 1, 40, 0][..], &a, &b].concat(),
        [&[0, 2, 0, 90, 1][..], &a, &b, &a].concat(),
        [&[0, 1, 17, 4][..], &b].concat(),
        [&MAGIC[..], &framed(&[8, 1])].concat(),
    ]
}
