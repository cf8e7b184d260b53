//! Memory for very many blocks: each on a border of its size, all of them in few large pieces.
//!
//! A block in memory of its own, as a general allocator gives it, begins behind a header, so the
//! kernel finds it on two pages whenever it is sent away, and each of these is far from the next:
//! the processor looks its address up anew for each block. Pieces are as large as the pages that
//! the kernel can map at once.
//!
//! Invariants:
//!
//! 1. A place belongs to one [`SlabPage`], or waits in `free`.
//! 2. The bytes of a page are written once, before anybody can see it.
//! 3. A piece is given back when the slab and all of its pages are gone, because each page keeps
//!    what they share. So the memory of a slab never shrinks below what was in use at once.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::fmt;
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::Arc;

use crate::sync::Mutex;

/// Bytes of a page, and its alignment.
const PAGE: usize = 4096;
/// Pages of the first piece: 64 KiB, as there are pools that hardly need any.
const PIECE_MIN: usize = 16;
/// Pages of the largest: 2 MiB, what a page table maps by one entry of the level above.
const PIECE_MAX: usize = 512;

/// Where pages come from and go back to.
#[derive(Clone, Debug, Default)]
pub struct Slab {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// Held for a push, a pop, or one call of the allocator.
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    pieces: Vec<Piece>,
    free: Vec<Place>,
    /// Pages of all pieces.
    pages: usize,
}

/// Memory of one page, of a piece that outlives it.
#[derive(Debug)]
struct Place(NonNull<[u8; PAGE]>);

// SAFETY: a place is nothing but the right to use its memory, which belongs to no thread (I1).
unsafe impl Send for Place {}
// SAFETY: a shared place only reads its memory, which nobody changes then (I2).
unsafe impl Sync for Place {}

#[derive(Debug)]
struct Piece {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a piece is nothing but the right to give its memory back, which any thread may do.
unsafe impl Send for Piece {}

impl Drop for Piece {
    fn drop(&mut self) {
        // SAFETY: allocated by `Piece::new` with this layout, and given back once. No page is left
        // that lies in it (I3).
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

impl Piece {
    fn new(pages: usize) -> Self {
        let bytes = pages * PAGE;
        let align = if pages == PIECE_MAX { bytes } else { PAGE };
        let layout = Layout::from_size_align(bytes, align).expect("sizes are small powers of two");
        // SAFETY: the layout is not of size zero.
        let start = NonNull::new(unsafe { alloc(layout) });
        let start = start.unwrap_or_else(|| handle_alloc_error(layout));
        if pages == PIECE_MAX {
            // SAFETY: the range is memory of ours, of whole pages; the advice changes no contents.
            // Where the kernel has no such pages it refuses, and small ones do.
            unsafe { libc::madvise(start.as_ptr().cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        Self { start, layout }
    }

    fn places(&self) -> impl Iterator<Item = Place> + use<> {
        let start = self.start.cast::<[u8; PAGE]>();
        // SAFETY: the piece is that many pages long, so each of them is within it.
        (0..self.layout.size() / PAGE).map(move |i| Place(unsafe { start.add(i) }))
    }
}

impl Slab {
    /// A page with these bytes.
    pub fn copy(&self, bytes: &[u8; PAGE]) -> SlabPage {
        let place = self.shared.state.lock().take();
        // SAFETY: the place is a page of memory that is ours alone (I1), aligned as a page of bytes
        // need be, and apart from `bytes`, which somebody else lends.
        unsafe { place.0.copy_from_nonoverlapping(NonNull::from(bytes), 1) };
        SlabPage {
            place: Some(place),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl State {
    fn take(&mut self) -> Place {
        if let Some(place) = self.free.pop() {
            return place;
        }
        let piece = Piece::new(self.pages.clamp(PIECE_MIN, PIECE_MAX).next_power_of_two());
        let mut places = piece.places();
        let first = places.next().expect("a piece has at least one page");
        self.free.extend(places);
        self.free.reverse(); // in ascending order
        self.pages += self.free.len() + 1;
        self.pieces.push(piece);
        first
    }
}

/// A page of a [`Slab`]; goes back to it when dropped.
pub struct SlabPage {
    /// Always there until the page is dropped.
    place: Option<Place>,
    shared: Arc<Shared>,
}

impl fmt::Debug for SlabPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SlabPage") // never the bytes, which are users' data
    }
}

impl Deref for SlabPage {
    type Target = [u8; PAGE];

    fn deref(&self) -> &[u8; PAGE] {
        let place = self.place.as_ref().expect("a page has a place");
        // SAFETY: the memory was written by `Slab::copy` (I2), nobody changes it while this page
        // has it (I1), and its piece is there as long as what they share (I3).
        unsafe { place.0.as_ref() }
    }
}

impl Drop for SlabPage {
    fn drop(&mut self) {
        self.shared.state.lock().free.extend(self.place.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_keep_their_bytes_and_their_memory_is_used_again() {
        let slab = Slab::default();
        let pages = |seed: usize| -> Vec<SlabPage> {
            (0..2000)
                .map(|i| slab.copy(&[(i * seed) as u8; PAGE]))
                .collect()
        };
        let check = |pages: &[SlabPage], seed: usize| {
            for (i, page) in pages.iter().enumerate() {
                assert!(page.as_ptr().addr().is_multiple_of(PAGE));
                assert_eq!(**page, [(i * seed) as u8; PAGE]);
            }
        };
        let mut first = pages(3);
        check(&first, 3);
        let made = slab.shared.state.lock().pages;
        first.truncate(1000);
        let second: Vec<_> = pages(7).into_iter().take(1000).collect();
        check(&first, 3);
        check(&second, 7);
        drop((first, second));
        let third = pages(5);
        check(&third, 5);
        let state = slab.shared.state.lock();
        assert!(state.pages < made + PIECE_MAX + 1000 && state.pages >= 3000);
        assert_eq!(state.free.len() + 2000, state.pages);
    }

    #[test]
    fn a_page_outlives_its_slab_in_another_thread() {
        let slab = Slab::default();
        let page = Arc::new(slab.copy(&[7; PAGE]));
        drop(slab);
        let other = Arc::clone(&page);
        let there = std::thread::spawn(move || other.iter().all(|byte| *byte == 7));
        drop(page);
        assert!(there.join().is_ok_and(|all| all));
    }
}
