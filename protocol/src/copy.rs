// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Bulk copies between shared and private memory. Each [`Region`](crate::region::Region) detects
//! once which way of copying suits the processor.
//!
//! Accesses to the shared side are aligned, which uncached memory needs, and each byte is accessed
//! once. On x86-64, assembly copies whole cache lines. The compiler does not see these accesses, so
//! a concurrent change of the shared side is no data race in Rust's sense: the copy is a mixture of
//! old and new bytes. Pieces of less than some lines, and all copies on other machines, go word by
//! word.
#![cfg_attr(
    all(target_arch = "x86_64", not(any(loom, miri))),
    expect(
        unsafe_code,
        reason = "assembly that copies from and to memory that others write"
    )
)]

use crate::sync::{AtomicU64, Ordering};

/// Way of copying.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By 16 bytes. Every x86-64 processor can do that.
    Sse,
    /// By 32 bytes. The processor needs AVX.
    Avx,
}

/// The way of copying, and the fences that order the copies, for one mapping.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Copier {
    #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
    way: Way,
    /// Whether the mapping is write-combining. Stores can overtake each other there, and loads can
    /// be made early: writes are "delayed and combined", and "speculative reads are allowed" (Intel
    /// SDM volume 3A, "Methods of Caching Available"). The usual order of x86 is that of write-back
    /// memory (same volume, "Memory Ordering in P6 and More Recent Processor Families"). Neither
    /// TCG nor loom can show a missing fence, because TCG has no cache modes, and loom has the
    /// order of Rust's atomics.
    is_combining: bool,
}

impl Copier {
    /// Detects the best way for this processor, over memory that is not write-combining.
    pub(crate) fn detect() -> Self {
        Copier {
            #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
            way: detect(),
            is_combining: false,
        }
    }

    /// Returns the same copier for write-combining memory.
    pub(crate) fn over_combining(self) -> Self {
        Copier {
            is_combining: true,
            ..self
        }
    }

    /// Orders all stores before the fence before all stores behind it.
    pub(crate) fn fence_stores(self) {
        if self.is_combining {
            self.fence_streamed();
            #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
            crate::sync::fence(Ordering::SeqCst);
        }
    }

    /// Orders streaming stores, which are weakly ordered in cached memory too (Intel SDM volume 1,
    /// "Caching of Temporal vs. Non-Temporal Data"), before all stores behind the fence. Other
    /// machines have no streaming stores here.
    pub(crate) fn fence_streamed(self) {
        #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
        // SAFETY: The instruction orders stores and does nothing else. The compiler keeps the order
        // as well, because the assembly may access memory.
        unsafe {
            core::arch::asm!("sfence", options(nostack, preserves_flags));
        };
    }

    /// Orders all loads before the fence before all loads behind it.
    pub(crate) fn fence_loads(self) {
        if self.is_combining {
            #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
            // SAFETY: The instruction orders loads and does nothing else. The compiler keeps the
            // order as well, because the assembly may access memory.
            unsafe {
                core::arch::asm!("lfence", options(nostack, preserves_flags));
            };
            #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
            crate::sync::fence(Ordering::SeqCst);
        }
    }

    /// Orders all accesses before the fence before all accesses behind it, on top of the fence of
    /// the same kind for ordinary memory. That one can be a locked instruction, and a locked
    /// instruction does not order loads of write-combining memory (Intel SDM volume 2, `MFENCE` and
    /// `LFENCE`).
    pub(crate) fn fence_all(self) {
        if self.is_combining {
            #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
            // SAFETY: The instructions order accesses and do nothing else. The compiler keeps the
            // order as well, because the assembly may access memory.
            unsafe {
                core::arch::asm!("mfence", "lfence", options(nostack, preserves_flags));
            };
        }
    }

    /// Copies into shared memory, with streaming stores if `streams` is true or the memory is
    /// write-combining. `bytes` is 8 times as long as `words`.
    #[inline]
    pub(crate) fn copy_in(self, words: &[AtomicU64], bytes: &[u8], streams: bool) {
        #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
        if words.len() >= LEAST {
            return self.lines_in(words, bytes, streams);
        }
        let _ = streams;
        words_in(words, bytes);
    }

    /// Copies out of shared memory. `bytes` is 8 times as long as `words`.
    #[inline]
    pub(crate) fn copy_out(self, bytes: &mut [u8], words: &[AtomicU64]) {
        #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
        if words.len() >= LEAST {
            return self.lines_out(bytes, words);
        }
        words_out(bytes, words);
    }
}

#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
impl Copier {
    #[inline(never)]
    fn lines_in(self, words: &[AtomicU64], bytes: &[u8], streams: bool) {
        assert_eq!(bytes.len(), words.len() * 8);
        let lines = lines(words);
        let (head, tail) = (8 * lines.start, 8 * lines.end);
        words_in(&words[..lines.start], &bytes[..head]);
        words_in(&words[lines.end..], &bytes[tail..]);
        let streams = self.is_combining || streams;
        let copy = match (self.way, streams) {
            (Way::Avx, false) => assembly::avx_in,
            (Way::Avx, true) => assembly::avx_stream_in,
            (Way::Sse, false) => assembly::sse_in,
            (Way::Sse, true) => assembly::sse_stream_in,
        };
        let (target, source) = (&words[lines], &bytes[head..tail]);
        // SAFETY: Both ranges have `source.len()` bytes, which are whole lines and not 0. `bytes`
        // is private memory, so the ranges do not overlap. The target consists of atomics, so it
        // may be written through a shared reference. `detect` saw that the processor has the
        // instructions.
        unsafe {
            copy(
                target.as_ptr().cast_mut().cast(),
                source.as_ptr(),
                source.len(),
            );
        };
    }

    #[inline(never)]
    fn lines_out(self, bytes: &mut [u8], words: &[AtomicU64]) {
        assert_eq!(bytes.len(), words.len() * 8);
        let lines = lines(words);
        let (head, tail) = (8 * lines.start, 8 * lines.end);
        words_out(&mut bytes[..head], &words[..lines.start]);
        words_out(&mut bytes[tail..], &words[lines.end..]);
        let copy = match self.way {
            Way::Avx => assembly::avx_out,
            Way::Sse => assembly::sse_out,
        };
        let (target, source) = (&mut bytes[head..tail], &words[lines]);
        // SAFETY: Both ranges have `target.len()` bytes, which are whole lines and not 0. `bytes`
        // is borrowed exclusively, so no other code accesses it, and the ranges do not overlap.
        // `detect` saw that the processor has the instructions.
        unsafe { copy(target.as_mut_ptr(), source.as_ptr().cast(), target.len()) };
    }
}

/// Number of words in a cache line, the unit of the assembly's copies.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
const BLOCK: usize = 8;

/// Minimum number of words for a copy of lines: as many always contain a whole line, and finding it
/// pays.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
const LEAST: usize = 3 * BLOCK;

/// Returns the range of these words, at least [`LEAST`], that are whole lines: one line or more.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
fn lines(words: &[AtomicU64]) -> core::ops::Range<usize> {
    let start = words.as_ptr().align_offset(BLOCK * 8);
    start..words.len() - (words.len() - start) % BLOCK
}

/// Number of words that are loaded before as many are stored, so that processors overlap the
/// accesses. As many registers need not be saved by a function.
const GROUP: usize = 4;

/// Copies word by word.
fn words_in(words: &[AtomicU64], bytes: &[u8]) {
    let (chunks, _) = bytes.as_chunks::<8>();
    // This check lets the compiler omit all others.
    let chunks = &chunks[..words.len()];
    let (groups, last_words) = words.as_chunks::<GROUP>();
    let (sources, last_chunks) = chunks.as_chunks::<GROUP>();
    for (group, source) in groups.iter().zip(sources) {
        let values = source.map(u64::from_le_bytes);
        for (word, value) in group.iter().zip(values) {
            word.store(value, Ordering::Relaxed);
        }
    }
    for (word, chunk) in last_words.iter().zip(last_chunks) {
        word.store(u64::from_le_bytes(*chunk), Ordering::Relaxed);
    }
}

/// Copies word by word, as [`words_in`] does.
fn words_out(bytes: &mut [u8], words: &[AtomicU64]) {
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    let chunks = &mut chunks[..words.len()];
    let (groups, last_words) = words.as_chunks::<GROUP>();
    let (targets, last_chunks) = chunks.as_chunks_mut::<GROUP>();
    for (group, target) in groups.iter().zip(targets) {
        let load = |word: &AtomicU64| word.load(Ordering::Relaxed).to_le_bytes();
        *target = group.each_ref().map(load);
    }
    for (word, chunk) in last_words.iter().zip(last_chunks) {
        *chunk = word.load(Ordering::Relaxed).to_le_bytes();
    }
}

/// Detects the fastest way.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
fn detect() -> Way {
    use core::arch::x86_64::__cpuid;
    const OSXSAVE: u32 = 1 << 27;
    const AVX: u32 = 1 << 28;
    /// Bits of XCR0: the system saves the registers of SSE and AVX.
    const STATE: u32 = 0b110;
    let features = __cpuid(1).ecx;
    if features & (OSXSAVE | AVX) != OSXSAVE | AVX {
        return Way::Sse;
    }
    let state: u32;
    // SAFETY: The instruction reads a register. OSXSAVE says that the system permits it.
    unsafe {
        core::arch::asm!("xgetbv", in("ecx") 0, out("eax") state, out("edx") _,
            options(nomem, nostack, preserves_flags));
    }
    if state & STATE == STATE {
        Way::Avx
    } else {
        Way::Sse
    }
}

/// Copies of whole lines.
#[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
mod assembly {
    /// Defines a copy by four loads and stores of 16 bytes for each block.
    macro_rules! sse {
        ($name:ident, $load:literal, $store:literal) => {
            copy!(
                $name,
                ["xmm0" "xmm1" "xmm2" "xmm3"],
                "",
                concat!($load, " xmm0, [{source}]"),
                concat!($load, " xmm1, [{source} + 16]"),
                concat!($load, " xmm2, [{source} + 32]"),
                concat!($load, " xmm3, [{source} + 48]"),
                concat!($store, " [{target}], xmm0"),
                concat!($store, " [{target} + 16], xmm1"),
                concat!($store, " [{target} + 32], xmm2"),
                concat!($store, " [{target} + 48], xmm3")
            );
        };
    }

    /// Defines a copy by two loads and stores of 32 bytes for each block, behind a `prefetch` of a
    /// later block of the shared side, which the other end's processor may have. A prefetch never
    /// faults, and is ignored for memory that is not cached (Intel SDM volume 2, `PREFETCHh` and
    /// `PREFETCHW`; a processor without `PREFETCHW` does nothing). The last instruction keeps later
    /// SSE instructions fast.
    macro_rules! avx {
        ($name:ident, $prefetch:literal, $load:literal, $store:literal) => {
            copy!(
                $name,
                // All registers, because `vzeroupper` changes the upper halves of all.
                [
                    "xmm0" "xmm1" "xmm2" "xmm3" "xmm4" "xmm5" "xmm6" "xmm7"
                    "xmm8" "xmm9" "xmm10" "xmm11" "xmm12" "xmm13" "xmm14" "xmm15"
                ],
                "vzeroupper",
                $prefetch,
                concat!($load, " ymm0, [{source}]"),
                concat!($load, " ymm1, [{source} + 32]"),
                concat!($store, " [{target}], ymm0"),
                concat!($store, " [{target} + 32], ymm1")
            );
        };
    }

    /// Defines a copy whose instructions for each block change these registers.
    macro_rules! copy {
        ($name:ident, [$($register:tt)+], $end:literal, $($instruction:expr),+) => {
            /// Copies blocks of 64 bytes.
            ///
            /// # Safety
            ///
            /// `length` must be a multiple of 64 and not 0. So many bytes must be readable at
            /// `source` and writable at `target`, and must not overlap. The shared one of both must
            /// be aligned to 64. The processor must have the instructions.
            pub(super) unsafe fn $name(target: *mut u8, source: *const u8, length: usize) {
                // SAFETY: The caller vouches for both ranges. All changed registers are declared;
                // `vzeroupper` changes only upper halves, which only code for AVX would use. Memory
                // is declared because `nomem` is absent.
                unsafe {
                    core::arch::asm!(
                        "2:",
                        $($instruction,)+
                        "add {source}, 64",
                        "add {target}, 64",
                        "sub {length}, 64",
                        "jnz 2b",
                        $end,
                        source = inout(reg) source => _,
                        target = inout(reg) target => _,
                        length = inout(reg) length => _,
                        $(out($register) _,)+
                        options(nostack),
                    );
                }
            }
        };
    }

    // All accesses to the shared side are aligned, so they use the instructions for aligned memory.
    sse!(sse_in, "movups", "movaps");
    sse!(sse_stream_in, "movups", "movntps");
    sse!(sse_out, "movaps", "movups");
    avx!(avx_in, "prefetchw [{target} + 1024]", "vmovups", "vmovaps");
    avx!(avx_stream_in, "", "vmovups", "vmovntps");
    avx!(
        avx_out,
        "prefetcht0 [{source} + 1024]",
        "vmovaps",
        "vmovups"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 64;

    /// Returns a copier for each way of copying and each kind of memory.
    fn copiers() -> impl Iterator<Item = Copier> {
        let best = Copier::detect();
        #[cfg(not(all(target_arch = "x86_64", not(any(loom, miri)))))]
        let all = [best];
        // Every x86-64 processor has SSE.
        #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
        let all = [
            best,
            Copier {
                way: Way::Sse,
                ..best
            },
        ];
        all.into_iter()
            .flat_map(|copier| [copier, copier.over_combining()])
    }

    fn in_both_ways(copier: Copier) -> [(Copier, bool); 2] {
        [(copier, false), (copier, true)]
    }

    /// Copies in every way, from every word to every word, and private memory at every byte. The
    /// copy has the source's bytes, and no byte beside it changes.
    #[test]
    fn each_way_copies_exactly_the_range() {
        let bytes: [u8; SIZE * 8 + 8] = core::array::from_fn(|index| (index * 7 + 1) as u8);
        for (copier, streams) in copiers().flat_map(in_both_ways) {
            for (start, end) in
                (0..SIZE).flat_map(|start| (start..=SIZE).map(move |end| (start, end)))
            {
                let (shift, length) = (start % 8, (end - start) * 8);
                let words = [const { AtomicU64::new(u64::MAX) }; SIZE];
                let source = &bytes[shift..shift + length];
                copier.copy_in(&words[start..end], source, streams);
                copier.fence_streamed();
                copier.fence_stores();
                copier.fence_loads();
                let mut seen = [0; SIZE * 8 + 8];
                copier.copy_out(&mut seen[shift..shift + length], &words[start..end]);
                assert_eq!(&seen[shift..shift + length], source, "{copier:?}");
                assert!(
                    seen[..shift]
                        .iter()
                        .chain(&seen[shift + length..])
                        .all(|&byte| byte == 0)
                );
                let (chunks, _) = source.as_chunks();
                for (index, word) in words.iter().enumerate() {
                    let meant = index.checked_sub(start).and_then(|index| chunks.get(index));
                    let meant = meant.map_or(u64::MAX, |chunk| u64::from_le_bytes(*chunk));
                    assert_eq!(word.load(Ordering::Relaxed), meant, "{copier:?}");
                }
            }
        }
    }

    #[cfg(all(target_arch = "x86_64", not(any(loom, miri))))]
    #[test]
    fn assembly_copies_whole_cache_lines() {
        let words = [const { AtomicU64::new(0) }; SIZE];
        for start in 0..BLOCK {
            for length in LEAST..SIZE - BLOCK {
                let words = &words[start..start + length];
                let lines = lines(words);
                assert!(!lines.is_empty() && lines.len().is_multiple_of(BLOCK));
                assert!(lines.start < BLOCK && length - lines.end < BLOCK);
                let first = words[lines].as_ptr().addr();
                assert!(first.is_multiple_of(BLOCK * 8));
            }
        }
    }
}
