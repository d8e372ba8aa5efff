//! What a prober sends as a gRPC message.

use bytes::Bytes;
use prost::Message;

use super::{HealthCheckRequest, only_message};

/// A body is taken only whole, and asked anew of the app it is what was understood.
pub(crate) fn message(bytes: &[u8]) {
    let Some(message) = only_message(&Bytes::copy_from_slice(bytes)) else {
        return;
    };
    let length = u32::try_from(message.len()).expect("a short input");
    assert_eq!(bytes, [&[0][..], &length.to_be_bytes(), &message].concat());
    if let Ok(asked) = HealthCheckRequest::decode(message) {
        let again = asked.encode_to_vec();
        assert_eq!(HealthCheckRequest::decode(&again[..]), Ok(asked));
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    vec![
        vec![0, 0, 0, 0, 0],
        vec![0, 0, 0, 0, 4, 0x0a, 2, b'd', b'b'],
        vec![1, 0, 0, 0, 4, 0x0a, 2, b'd', b'b'],
        vec![0, 0, 0, 0, 3, 0x0a, 2, b'd', b'b'],
    ]
}
