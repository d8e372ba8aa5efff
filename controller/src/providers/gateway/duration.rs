//! Durations of the Gateway API (GEP-2257): up to four parts of up to five digits with `h`, `m`, `s` or `ms`.

/// Milliseconds.
pub(crate) type Milliseconds = u64;

/// Reads a duration; the error says what was expected.
pub(crate) fn duration(text: &str) -> Result<Milliseconds, String> {
    parse(text).ok_or_else(|| {
        format!("expected a duration such as 500ms, 10s or 1h30m (GEP-2257), found {text:?}")
    })
}

fn parse(text: &str) -> Option<Milliseconds> {
    let (mut rest, mut total, mut parts) = (text, 0u64, 0);
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        if digits == 0 || digits > 5 || parts == 4 {
            return None;
        }
        let (number, unit) = rest.split_at(digits);
        let number: u64 = number.parse().ok()?;
        // `ms` before `m`: the longer unit is meant.
        let (factor, length) = match unit {
            u if u.starts_with("ms") => (1, 2),
            u if u.starts_with('s') => (1_000, 1),
            u if u.starts_with('m') => (60_000, 1),
            u if u.starts_with('h') => (3_600_000, 1),
            _ => return None,
        };
        total += number * factor;
        rest = &unit[length..];
        parts += 1;
    }
    (parts > 0).then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The examples of GEP-2257.
    #[test]
    fn gep_2257() {
        for (text, expected) in [
            ("0h", 0),
            ("0s", 0),
            ("0h0m0s", 0),
            ("1h", 3_600_000),
            ("30m", 1_800_000),
            ("10s", 10_000),
            ("500ms", 500),
            ("2h30m", 9_000_000),
            ("150m", 9_000_000),
            ("7230s", 7_230_000),
            ("1h30m10s", 5_410_000),
            ("10s30m1h", 5_410_000),
            ("100ms200ms300ms", 600),
        ] {
            assert_eq!(duration(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "1",
            "1m1",
            "1h30m10s20ms50h",
            "999999h",
            "1.5h",
            "-15m",
            " 1s",
            "1 s",
            "1S",
            "1us",
            "ms",
        ] {
            assert!(duration(text).is_err(), "{text}");
        }
    }
}
