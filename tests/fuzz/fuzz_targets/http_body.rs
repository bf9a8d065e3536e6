#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| tasklane_tests::fuzz::http_body(input));
