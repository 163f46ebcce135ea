// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Sizes and offsets as people write them.

/// Parses a size in bytes, with K, M or G (powers of 1024) if wanted.
pub fn parse_size(text: &str) -> Result<u64, String> {
    parse_size::Config::new()
        .with_binary()
        .parse_size(text)
        .map_err(|error| format!("`{text}` is no size: {error} (say 64M, 1G or a number of bytes)"))
}

/// Parses an offset: a size, or a hexadecimal number with 0x.
pub fn parse_offset(text: &str) -> Result<u64, String> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16)
            .map_err(|error| format!("`{text}` is no offset: {error}")),
        None => parse_size(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_sizes_or_hexadecimal() {
        assert_eq!(parse_offset("4K"), Ok(4096));
        assert_eq!(parse_offset("0x1f"), Ok(31));
        assert!(parse_offset("0xzz").is_err() && parse_offset("-1").is_err());
    }
}
