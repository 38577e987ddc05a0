//! jemalloc's options, which it reads from a symbol before `main`.

/// As in jemalloc(3), "malloc_conf": profiling is possible, inactive, and samples once in 512 KiB.
#[expect(unsafe_code, reason = "jemalloc finds its options by the symbol's name")]
// SAFETY: jemalloc declares `const char *malloc_conf`, here with the prefix that its build gives
// it. A reference to an array is one pointer; what it points to lives for ever and ends with a NUL.
// Nothing else has that name.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub(super) static OPTIONS: &[u8; 46] = b"prof:true,prof_active:false,lg_prof_sample:19\0";
