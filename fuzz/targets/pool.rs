//! Fuzz target `pool`: see the function of this name in `src/bodies.rs`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nodupe_fuzz::bodies::pool(data));
