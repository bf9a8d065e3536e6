//! The program's allocator: however many submissions there were, it has the same memory (ADR 23).

use std::alloc::{GlobalAlloc, Layout};

use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: WrittenTo = WrittenTo;

/// What jemalloc reads at its start, see "TUNING" in `jemalloc(3)`: an arena a core, no caches for the threads, and a thread that
/// gives free pages back within a second.
#[expect(unsafe_code, reason = "jemalloc looks for this name, and for the zero that ends a string in C")]
#[unsafe(export_name = "_rjem_malloc_conf")]
static SETTINGS: &[u8; 89] =
    b"narenas_ratio:1,tcache:false,background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0\0";

/// jemalloc, and zeroed memory is written to at once.
///
/// lapin keeps four zeroed buffers of 1 MiB, and a confirm fills the next 21 bytes of one: left to the kernel, they would become
/// resident over the first three million submissions, which looks like a leak.
struct WrittenTo;

// SAFETY: each call goes to jemalloc as it came, and the provided `alloc_zeroed` writes zeros to what `alloc` gives.
#[expect(unsafe_code, reason = "an allocator is an unsafe trait")]
unsafe impl GlobalAlloc for WrittenTo {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise is the one that is asked for here.
        unsafe { Jemalloc.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { Jemalloc.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as above.
        unsafe { Jemalloc.realloc(block, layout, size) }
    }
}
