//! Byte sizes as people write and read them: binary units only, exact arithmetic.
//!
//! 1. `K M G T P` are powers of 1024, with or without `iB`. `KB`, `MB`... are refused, because
//!    half of the readers take them for powers of 1000.
//! 2. Nothing is rounded silently: what does not come to whole bytes is an error.

use bytesize::ByteSize;

/// Smallest pool.
pub(super) const POOL_SIZE_MIN: u64 = 64 * 1024 * 1024; // 64 MiB
/// Largest pool.
pub(super) const POOL_SIZE_MAX: u64 = 1024 * 1024 * 1024 * 1024 * 1024; // 1 PiB
/// Size of a new pool unless told otherwise. The file is sparse, so it costs nothing.
pub(super) const POOL_SIZE_DEFAULT: u64 = 100 * 1024 * 1024 * 1024; // 100 GiB
#[cfg(feature = "fuse")]
/// Smallest bound of the caches: below it the daemon cannot work.
const CACHE_SIZE_MIN: u64 = 16 * 1024 * 1024; // 16 MiB
/// Smallest journal ring.
const JOURNAL_SIZE_MIN: u64 = 1024 * 1024; // 1 MiB

/// Parses `4096`, `64M`, `1.5T`, `100GiB`.
pub(super) fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let multiplier = multiplier(unit.trim())?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let missing = || format!("'{text}' is not a size: write a number and a unit, as in 100G");
    if whole.is_empty() || (number.contains('.') && fraction.is_empty()) {
        return Err(missing());
    }
    const FRACTION_DIGITS_MAX: usize = 15; // 10^15 * 2^50 fits in 128 bits
    if fraction.len() > FRACTION_DIGITS_MAX {
        return Err(format!("'{text}' has too many digits after the point"));
    }
    let too_large = || format!("'{text}' is too large: 1P is the limit of a pool");
    let whole: u128 = whole.parse().map_err(|_| too_large())?;
    let scale = 10_u128.pow(u32::try_from(fraction.len()).map_err(|_| missing())?);
    let fraction: u128 = match fraction {
        "" => 0,
        digits => digits.parse().map_err(|_| missing())?,
    };
    let scaled = fraction * u128::from(multiplier);
    if !scaled.is_multiple_of(scale) {
        return Err(format!("'{text}' is not a whole number of bytes"));
    }
    whole
        .checked_mul(u128::from(multiplier))
        .and_then(|bytes| bytes.checked_add(scaled / scale))
        .and_then(|bytes| u64::try_from(bytes).ok())
        .ok_or_else(too_large)
}

fn multiplier(unit: &str) -> Result<u64, String> {
    const UNITS: [&str; 6] = ["", "k", "m", "g", "t", "p"];
    let lower = unit.to_ascii_lowercase();
    if lower == "b" {
        return Ok(1);
    }
    let letter = lower.strip_suffix("ib").unwrap_or(&lower);
    let letter = letter.strip_suffix('i').unwrap_or(letter);
    match UNITS
        .iter()
        .zip(0_u32..)
        .find(|(known, _)| **known == letter)
    {
        Some((_, power)) if !letter.is_empty() || lower.is_empty() => Ok(1024_u64.pow(power)),
        _ if matches!(lower.as_str(), "kb" | "mb" | "gb" | "tb" | "pb") => {
            let letter = unit[..1].to_ascii_uppercase();
            Err(format!(
                "unit '{unit}' is ambiguous: write {letter} or {letter}iB, a power of 1024"
            ))
        }
        _ => Err(format!("unknown unit '{unit}': use K, M, G, T or P")),
    }
}

/// As [`parse`], for the size of a pool.
pub(super) fn parse_pool_size(text: &str) -> Result<u64, String> {
    let size = parse(text)?;
    if (POOL_SIZE_MIN..=POOL_SIZE_MAX).contains(&size) {
        Ok(size)
    } else {
        Err(format!("'{text}': a pool has 64 MiB to 1 PiB"))
    }
}

/// What a pool grows to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Growth {
    /// This size, in bytes.
    To(u64),
    /// So many bytes more.
    By(u64),
}

/// Parses `200G` or `+50G`.
pub(super) fn parse_growth(text: &str) -> Result<Growth, String> {
    match text.trim().strip_prefix('+') {
        Some(more) => parse(more).map(Growth::By),
        None => parse(text).map(Growth::To),
    }
}

/// As [`parse`], for the size of a journal.
pub(super) fn parse_journal_size(text: &str) -> Result<u64, String> {
    match parse(text)? {
        size if size >= JOURNAL_SIZE_MIN => Ok(size),
        _ => Err(format!("'{text}': a journal has at least 1 MiB")),
    }
}

#[cfg(feature = "fuse")]
/// As [`parse`], for the bound of the caches.
pub(super) fn parse_cache_size(text: &str) -> Result<u64, String> {
    match parse(text)? {
        size if size >= CACHE_SIZE_MIN => Ok(size),
        _ => Err(format!("'{text}': the cache needs at least 16 MiB")),
    }
}

/// `bytes` for people: `1.5 GiB`, `100 GiB`.
pub(super) fn human(bytes: u64) -> String {
    let text = ByteSize::b(bytes).display().iec().to_string();
    text.replace(".0 ", " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn binary_units_are_exact() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("512B", 512),
            ("64M", 64 << 20),
            ("64 MiB", 64 << 20),
            ("100g", 100 << 30),
            ("1.5T", 3 << 39),
            ("1P", 1 << 50),
            ("0.5Ki", 512),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_a_reason() {
        for (text, reason) in [
            ("", "not a size"),
            ("G", "not a size"),
            (".5G", "not a size"),
            ("5.G", "not a size"),
            ("1.2.3G", "not a size"),
            ("-1G", "unknown unit"),
            ("1X", "unknown unit"),
            ("1iB", "unknown unit"),
            ("100GB", "ambiguous"),
            ("0.3", "whole number of bytes"),
            ("99999999999999999999P", "too large"),
            ("0.1234567890123456G", "too many digits"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
        assert_eq!(parse_growth("+1G"), Ok(Growth::By(1 << 30)));
        assert_eq!(parse_growth("2G"), Ok(Growth::To(2 << 30)));
        assert!(parse_growth("-1G").is_err() && parse_growth("++1G").is_err());
        assert!(parse_pool_size("63M").is_err());
        assert!(parse_pool_size("1025T").is_err());
        assert!(parse_pool_size("64M").is_ok());
        assert!(parse_pool_size("1P").is_ok());
    }

    #[test]
    fn people_read_round_numbers() {
        assert_eq!(human(0), "0 B");
        assert_eq!(human(100 << 30), "100 GiB");
        assert_eq!(human(3 << 29), "1.5 GiB");
    }
}
