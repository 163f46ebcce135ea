// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sizes and offsets on the command line, in bytes, and times.

use std::fmt::{Display, Formatter};
use std::time::Duration;

use indicatif::BinaryBytes;

/// Parses a size in bytes, with an optional unit such as K, M or G (powers of 1024).
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| match error {
            parse_size::Error::PosOverflow => {
                format!("size `{text}` exceeds 64 bits: use a number of bytes, or 64M, 1G")
            }
            _ => format!("invalid size `{text}`: use a number of bytes, or 64M, 1G"),
        })
}

/// Formats a size for [`parse_size()`], in the largest unit that gives a whole number.
pub fn show_size(size: u64) -> String {
    let units = [(40, "T"), (30, "G"), (20, "M"), (10, "K")];
    let whole = |(shift, _): &(u32, &str)| size != 0 && size.trailing_zeros() >= *shift;
    match units.into_iter().find(whole) {
        Some((shift, unit)) => format!("{}{unit}", size >> shift),
        None => size.to_string(),
    }
}

/// A size for an error. It is shown in a larger unit if two decimals of that are exact, otherwise
/// in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Exact(pub u64);

impl Display for Exact {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        // BinaryBytes takes the largest unit that is not above the size.
        let shift = self.0.checked_ilog2().map_or(0, |log| log / 10 * 10);
        let hundredths = u128::from(self.0) * 100;
        match hundredths % (1 << shift) {
            0 => BinaryBytes(self.0).fmt(f),
            _ => write!(f, "{} bytes", self.0),
        }
    }
}

/// Parses an offset in bytes: a size, or a hexadecimal number with 0x.
pub fn parse_offset(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) => {
            let is_number = digits.starts_with(|c: char| c.is_ascii_hexdigit());
            let number = u64::from_str_radix(digits, 16).ok().filter(|_| is_number);
            number.ok_or_else(|| {
                format!("invalid offset `{text}`: use a number of bytes, or 4K, or 0x1000")
            })
        }
        None => parse_size(text),
    }
}

/// Parses a time: a number of seconds, or a number with the unit `ms`, `s`, `m` or `h`.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let units = [("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];
    let mut units = units.iter();
    let (number, unit) = units
        .find_map(|(name, unit)| Some((text.strip_suffix(name)?, *unit)))
        .unwrap_or((text, 1.0));
    let digits = number.starts_with(|c: char| c.is_ascii_digit());
    let seconds = number.parse::<f64>().ok().filter(|_| digits);
    seconds
        .and_then(|number| Duration::try_from_secs_f64(number * unit).ok())
        .ok_or_else(|| format!("invalid time `{text}`: use a number of seconds, or 500ms, 5m, 1h"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parses_times_with_units() {
        for (text, milliseconds) in [("5", 5000), ("0.5", 500), ("20ms", 20), ("2m", 120_000)] {
            assert_eq!(
                parse_time(text),
                Ok(Duration::from_millis(milliseconds)),
                "{text}"
            );
        }
        for text in ["", "s", "-1", "+1", "inf", "nan", "1e30", "5 x", "1d"] {
            assert!(parse_time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn size_formatting_reverses_parsing() {
        for text in [
            "0", "1", "1023", "1K", "1025", "64M", "3G", "1536M", "8T", "8388608T",
        ] {
            assert_eq!(show_size(parse_size(text).unwrap()), text);
        }
    }

    #[test]
    fn error_shows_inexact_size_in_bytes() {
        for (size, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (4096, "4.00 KiB"),
            (4097, "4097 bytes"),
            (1536, "1.50 KiB"),
            (100 << 20, "100.00 MiB"),
            ((100 << 20) + 1, "104857601 bytes"),
            (u64::MAX, "18446744073709551615 bytes"),
        ] {
            assert_eq!(Exact(size).to_string(), text);
        }
    }

    #[test]
    fn rejects_invalid_size_with_example() {
        for (text, cause) in [
            ("", "invalid size"),
            ("much", "invalid size"),
            ("-5", "invalid size"),
            ("16E", "64 bits"),
        ] {
            let error = parse_size(text).unwrap_err();
            assert!(
                error.contains(cause) && error.contains("use a number of bytes, or 64M"),
                "{error}"
            );
        }
    }

    #[test]
    fn offsets_are_sizes_or_hexadecimal() {
        assert_eq!(parse_offset("4K"), Ok(4096));
        assert_eq!(parse_offset("0x1f"), Ok(31));
        for text in ["0xzz", "0x", "0x+1", "0x-1", "0x10000000000000000", "-1"] {
            assert!(parse_offset(text).is_err(), "{text}");
        }
    }
}
