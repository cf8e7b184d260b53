//! Fuzz target `image`: see the function of this name in `src/images.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nodupe_fuzz::images::image(data));
