// SPDX-License-Identifier: Apache-2.0 OR MIT

//! A field of a type that has a destructor, which can be moved out all the same.

use std::ops::{Deref, DerefMut};

const TAKEN: &str = "the value was taken, which ends its owner";

/// A value that its owner can move out. The owner is not used after that.
#[derive(Debug)]
pub(crate) struct Owned<T>(Option<T>);

impl<T> Owned<T> {
    /// Wraps a value.
    pub(crate) fn new(value: T) -> Self {
        Owned(Some(value))
    }

    /// Returns the value, if it was not taken.
    pub(crate) fn get(&mut self) -> Option<&mut T> {
        self.0.as_mut()
    }

    /// Takes the value. The owner is not used after this call.
    pub(crate) fn take(&mut self) -> T {
        self.0.take().expect(TAKEN)
    }
}

impl<T> Deref for Owned<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        self.0.as_ref().expect(TAKEN)
    }
}

impl<T> DerefMut for Owned<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect(TAKEN)
    }
}
