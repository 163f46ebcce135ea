// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Which record may come next, and what it means if another one does.

/// What a consumer knows of the records before the next one.
///
/// It notes a number before it releases a record, and again afterwards. So of one that died it is known that all below
/// `released` were released, and that none from `delivered` on was; the one between the two, if there is one, can have
/// been either.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Journal {
    released: u64,
    delivered: u64,
}

/// What the number of a record says.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Verdict {
    /// So many records before it never came.
    pub lost: u64,
    /// It, and so many after it, came after they were released.
    pub twice: u64,
    /// It came before, and was not released, as far as is known.
    pub again: bool,
}

impl Journal {
    /// What the last consumer noted; all 0 for the first one.
    pub fn new(released: u64, delivered: u64) -> Self {
        Self {
            released,
            delivered,
        }
    }

    /// Judges the next record by its number, and takes it for released: of the one behind it nothing is in doubt.
    pub fn judge(&mut self, number: u64) -> Verdict {
        let verdict = Verdict {
            lost: number.saturating_sub(self.delivered),
            twice: self.released.saturating_sub(number),
            again: (self.released..self.delivered).contains(&number),
        };
        self.released = number + 1;
        self.delivered = number + 1;
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn judge(released: u64, delivered: u64, number: u64) -> Verdict {
        Journal::new(released, delivered).judge(number)
    }

    #[test]
    fn first_record_of_a_successor_is_judged_by_what_was_noted() {
        let fine = Verdict::default();
        assert_eq!(judge(0, 0, 0), fine);
        assert_eq!(judge(5, 5, 5), fine);
        assert_eq!(judge(5, 5, 7), Verdict { lost: 2, ..fine });
        assert_eq!(judge(5, 5, 2), Verdict { twice: 3, ..fine });
        // Delivered, and perhaps released.
        let again = Verdict {
            again: true,
            ..fine
        };
        assert_eq!(judge(5, 6, 5), again);
        assert_eq!(judge(5, 6, 6), fine);
        assert_eq!(judge(5, 6, 7), Verdict { lost: 1, ..fine });
        assert_eq!(judge(5, 6, 4), Verdict { twice: 1, ..fine });
    }

    #[test]
    fn each_record_behind_the_first_is_the_next_one() {
        let mut journal = Journal::new(5, 6);
        let fine = Verdict::default();
        journal.judge(5);
        assert_eq!(journal.judge(6), fine);
        assert_eq!(journal.judge(8), Verdict { lost: 1, ..fine });
        assert_eq!(journal.judge(8), Verdict { twice: 1, ..fine });
        assert_eq!(journal.judge(9), fine);
    }
}
