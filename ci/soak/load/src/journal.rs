// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Judges a record by its number: which record may come next, and the fault that another number
//! shows.

/// The records that a consumer has had before the next one, as two numbers.
///
/// A consumer notes a number before it releases a record, and again afterwards. After its death all
/// records below `released` are known to be released, and all from `delivered` on are known not to
/// be. A record between the two, if there is one, may or may not be released.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Journal {
    released: u64,
    delivered: u64,
}

/// The verdict on the number of a record.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Verdict {
    /// Number of records before it that never came.
    pub lost: u64,
    /// Number of records, from this one on, that were released before and come again.
    pub twice: u64,
    /// Whether the record came before and was not released, as far as is known.
    pub again: bool,
}

impl Journal {
    /// Creates a journal from the notes of the last consumer; both numbers are 0 for the first
    /// consumer.
    pub fn new(released: u64, delivered: u64) -> Self {
        Self {
            released,
            delivered,
        }
    }

    /// Judges the next record by its number, and counts it as released, because the next record is
    /// then known exactly.
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
    fn journal_judges_first_record_of_successor() {
        let fine = Verdict::default();
        assert_eq!(judge(0, 0, 0), fine);
        assert_eq!(judge(5, 5, 5), fine);
        assert_eq!(judge(5, 5, 7), Verdict { lost: 2, ..fine });
        assert_eq!(judge(5, 5, 2), Verdict { twice: 3, ..fine });
        // The record was delivered, and perhaps released.
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
    fn journal_expects_consecutive_records() {
        let mut journal = Journal::new(5, 6);
        let fine = Verdict::default();
        journal.judge(5);
        assert_eq!(journal.judge(6), fine);
        assert_eq!(journal.judge(8), Verdict { lost: 1, ..fine });
        assert_eq!(journal.judge(8), Verdict { twice: 1, ..fine });
        assert_eq!(journal.judge(9), fine);
    }
}
