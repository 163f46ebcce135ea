// SPDX-License-Identifier: Apache-2.0 OR MIT

//! The median and the range of some numbers.

use serde::Serialize;

/// Least number of rounds that have quartiles: one round for each quarter.
const QUARTERS: usize = 4;

/// Returns the rounds whose figures [`Spread::range`] contains, in words.
pub fn range_name(rounds: u32) -> &'static str {
    match rounds as usize >= QUARTERS {
        true => "half of the rounds",
        false => "all rounds",
    }
}

/// Numbers of one kind, one for each round, in ascending order.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Spread {
    figures: Vec<f64>,
}

impl Spread {
    /// Adds a number.
    pub fn add(&mut self, figure: f64) {
        let place = self.figures.partition_point(|other| *other < figure);
        self.figures.insert(place, figure);
    }

    /// Returns the median; 0 if there is no number.
    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    /// Returns the first and the third quartile, or the least and the greatest of fewer than four
    /// numbers.
    pub fn range(&self) -> [f64; 2] {
        let parts = match self.figures.len() >= QUARTERS {
            true => [0.25, 0.75],
            false => [0.0, 1.0],
        };
        parts.map(|part| self.quantile(part))
    }

    /// Returns how many numbers there are.
    pub fn count(&self) -> usize {
        self.figures.len()
    }

    /// Returns a quantile, interpolated between two numbers.
    fn quantile(&self, part: f64) -> f64 {
        let Some(last) = self.figures.len().checked_sub(1) else {
            return 0.0;
        };
        let place = part * last as f64;
        let below = self.figures[place.floor() as usize];
        let above = self.figures[place.ceil() as usize];
        below + (above - below) * place.fract()
    }
}

#[cfg(test)]
mod tests {
    use super::{Spread, range_name};

    #[test]
    fn spread_computes_median_and_quartiles() {
        let mut spread = Spread::default();
        assert_eq!(spread.median(), 0.0);
        for figure in [9.0, 1.0, 5.0, 3.0] {
            spread.add(figure);
        }
        assert_eq!(spread.median(), 4.0);
        assert_eq!(spread.range(), [2.5, 6.0]);
        spread.add(100.0);
        assert_eq!((spread.median(), spread.range()), (5.0, [3.0, 9.0]));
        assert_eq!(range_name(4), "half of the rounds");
    }

    #[test]
    fn few_rounds_show_their_extremes() {
        let mut spread = Spread::default();
        for figure in [9.0, 1.0, 5.0] {
            spread.add(figure);
        }
        assert_eq!((spread.median(), spread.range()), (5.0, [1.0, 9.0]));
        assert_eq!(range_name(3), "all rounds");
    }
}
