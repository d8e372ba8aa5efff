//! Headers that no app and no route may write. One list for both sides: the controller says of a route what the
//! proxies would refuse.

/// Whether only proxies may say this. Names have no case. `_` for `-`: to a CGI program both are the same variable
/// (RFC 3875, section 4.1.18).
pub fn is_reserved(name: &str) -> bool {
    let Some((start, rest)) = name.split_at_checked(OWN.len()) else {
        return false;
    };
    start.eq_ignore_ascii_case(OWN) && rest.starts_with(['-', '_'])
}

/// Why no header of this name can be set or added to; `None`: it can. Names have no case.
pub fn refuse_set(name: &str) -> Option<&'static str> {
    if is_hop_by_hop(name) {
        return Some("cannot be set: it belongs to one connection (RFC 9110, 7.6.1)");
    }
    refuse_remove(name)
}

/// Why no header of this name can be removed; `None`: it can, or is not there to be ([`is_hop_by_hop`]).
pub fn refuse_remove(name: &str) -> Option<&'static str> {
    if is_one_of(&FRAMING, name) {
        return Some("cannot be changed: it is part of how a message is framed");
    }
    if is_reserved(name) {
        return Some(
            "cannot be changed: headers that begin with warren- or warren_ are the mesh's own",
        );
    }
    None
}

/// Whether a header is about one connection. Proxies do not pass it on as it came, so that there is none to
/// remove: what they send in its place is their own to say (`te: trailers`, `upgrade`).
pub fn is_hop_by_hop(name: &str) -> bool {
    is_one_of(&HOP_BY_HOP, name)
}

fn is_one_of(names: &[&str], name: &str) -> bool {
    names.iter().any(|one| one.eq_ignore_ascii_case(name))
}

/// RFC 9110, 7.6.1, and `HTTP2-Settings` (RFC 7540, 3.2.1).
const HOP_BY_HOP: [&str; 7] = [
    "connection",
    "http2-settings",
    "keep-alive",
    "proxy-connection",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// RFC 9112, 6.2; RFC 9110, 6.6.2.
const FRAMING: [&str; 2] = ["content-length", "trailer"];

/// How the names of the mesh's own headers begin.
const OWN: &str = "warren";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_changed() {
        for name in ["Connection", "keep-alive", "TE", "Upgrade"] {
            assert!(refuse_set(name).is_some(), "{name}");
            assert!(refuse_remove(name).is_none(), "{name}");
            assert!(is_hop_by_hop(name), "{name}");
        }
        let own = ["Warren-Client-Id", "warren-", "Warren_Client_Id", "WARREN_"];
        for name in own.iter().chain(&["Content-Length", "trailer"]) {
            assert!(refuse_set(name).is_some(), "{name}");
            assert!(refuse_remove(name).is_some(), "{name}");
            assert_eq!(is_reserved(name), own.contains(name), "{name}");
        }
        for name in [
            "x-a",
            "host",
            "warren",
            "warrens-a",
            "warréns",
            "x-warren-a",
            "",
            "é",
        ] {
            assert!(refuse_set(name).is_none(), "{name}");
            assert!(refuse_remove(name).is_none(), "{name}");
            assert!(!is_reserved(name), "{name}");
        }
    }
}
