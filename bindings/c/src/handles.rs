// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Handles: numbers that look like pointers, and stand for values of the library. A number that was
//! closed, or that no function has returned, is an error and reaches no memory.

use std::ptr;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

use crate::failure::{Code, Failure};

/// Most handles of a type at a time.
const COUNT: usize = 1024;

/// A place for a value. The generation is part of the handle, so that a handle that was closed is
/// none of a later value.
struct Place<T> {
    generation: AtomicU32,
    value: AtomicPtr<T>,
}

/// The values of one type.
pub(crate) struct Handles<T> {
    places: [Place<T>; COUNT],
    /// The places that have no value, once they had one, and the number of those that had one.
    free: Mutex<(Vec<u32>, u32)>,
    /// The type, in texts of errors.
    name: &'static str,
    /// The type, in numbers.
    tag: u8,
}

impl<T: Send> Handles<T> {
    pub(crate) const fn new(tag: u8, name: &'static str) -> Self {
        Handles {
            places: [const {
                Place {
                    generation: AtomicU32::new(0),
                    value: AtomicPtr::new(ptr::null_mut()),
                }
            }; COUNT],
            free: Mutex::new((Vec::new(), 0)),
            name,
            tag,
        }
    }

    /// Keeps a value, and returns its handle.
    pub(crate) fn insert<H>(&self, value: T) -> Result<*mut H, Failure> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let index = match free.0.pop() {
            Some(index) => index,
            None if (free.1 as usize) < COUNT => {
                free.1 += 1;
                free.1 - 1
            }
            None => {
                let text = format!("the process has {COUNT} {}s already: close one", self.name);
                return Err(Failure::new(Code::Other, text));
            }
        };
        let place = &self.places[index as usize];
        place
            .value
            .store(Box::into_raw(Box::new(value)), Ordering::Release);
        let generation = place.generation.load(Ordering::Relaxed);
        Ok(ptr::without_provenance_mut(self.number(index, generation)))
    }

    /// Computes the number of a handle: never 0, and odd, so that it is no pointer to an object.
    fn number(&self, index: u32, generation: u32) -> usize {
        (generation as usize) << 32 | (index as usize) << 16 | usize::from(self.tag) << 8 | 1
    }

    fn place(&self, handle: usize) -> Result<(u32, &Place<T>), Failure> {
        let index = handle >> 16 & 0xffff;
        if let Some(place) = self.places.get(index) {
            let generation = place.generation.load(Ordering::Relaxed);
            let index = index as u32;
            if self.number(index, generation) == handle {
                return Ok((index, place));
            }
        }
        Err(self.wrong(handle))
    }

    #[cold]
    fn wrong(&self, handle: usize) -> Failure {
        let name = self.name;
        Failure::invalid(match handle {
            0 => format!("NULL is no {name}"),
            _ => format!("the handle is no {name}, or was closed"),
        })
    }

    /// Returns the value of a handle, which several threads can use at a time.
    ///
    /// # Safety
    ///
    /// No thread removes the value during `'a`, and none has it by [`Handles::get`].
    #[inline]
    pub(crate) unsafe fn share<'a, H>(&self, handle: *mut H) -> Result<&'a T, Failure>
    where
        T: Sync,
    {
        let value = self.find(handle)?;
        // SAFETY: the value lives until `remove`, which no thread calls meanwhile.
        Ok(unsafe { &*value })
    }

    /// Returns the value of a handle, for this thread alone.
    ///
    /// # Safety
    ///
    /// No other thread uses the handle during `'a`.
    #[inline]
    pub(crate) unsafe fn get<'a, H>(&self, handle: *mut H) -> Result<&'a mut T, Failure> {
        let value = self.find(handle)?;
        // SAFETY: the value lives until `remove`, and no other thread uses it meanwhile.
        Ok(unsafe { &mut *value })
    }

    #[inline]
    fn find<H>(&self, handle: *mut H) -> Result<*mut T, Failure> {
        let (_, place) = self.place(handle.addr())?;
        match place.value.load(Ordering::Acquire) {
            value if value.is_null() => Err(self.wrong(handle.addr())),
            value => Ok(value),
        }
    }

    /// Removes the value of a handle.
    ///
    /// # Safety
    ///
    /// No other thread uses this handle.
    pub(crate) unsafe fn remove<H>(&self, handle: *mut H) -> Result<Box<T>, Failure> {
        let (index, place) = self.place(handle.addr())?;
        let value = place.value.swap(ptr::null_mut(), Ordering::AcqRel);
        if value.is_null() {
            return Err(self.wrong(handle.addr()));
        }
        // After 2³² values a place is used no more, because a number would come again.
        let last = place.generation.fetch_add(1, Ordering::Relaxed) == u32::MAX - 1;
        if !last {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            free.0.push(index);
        }
        // SAFETY: `insert` made the pointer by `Box::into_raw`, and the swap took it once.
        Ok(unsafe { Box::from_raw(value) })
    }
}
