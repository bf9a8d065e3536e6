//! What the allocator of the C library is told, so that memory that was needed once is given back.

/// Keeps glibc from holding on to what large requests have left behind. To be called before there are threads.
///
/// Left alone it makes eight arenas a core, each with its own unused rest, and after the first large buffer it serves large
/// ones out of them instead of mapping and unmapping each. See `mallopt(3)`; without glibc this does nothing.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    glibc::give_back();
}

#[cfg(all(target_os = "linux", target_env = "gnu"))]
mod glibc {
    /// Larger blocks are mapped, each for itself; setting it at all stops glibc from raising it. In bytes.
    const MMAP_THRESHOLD: i32 = 128 * 1024;

    #[expect(unsafe_code, reason = "mallopt has no safe form; it takes two numbers and keeps no pointer")]
    pub(super) fn give_back() {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let arenas = i32::try_from(cores.max(2)).unwrap_or(i32::MAX);
        // SAFETY: no argument is a pointer, and the process has only this thread yet.
        unsafe {
            libc::mallopt(libc::M_ARENA_MAX, arenas);
            libc::mallopt(libc::M_MMAP_THRESHOLD, MMAP_THRESHOLD);
        }
    }
}
