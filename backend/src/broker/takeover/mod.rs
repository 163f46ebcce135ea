// SPDX-License-Identifier: Apache-2.0 OR MIT

//! Taking over: a broker is created from nothing, or from the descriptors of a predecessor, while
//! VMs and host apps continue.

mod hand_over;
mod parts;
mod predecessor;

pub use self::hand_over::{hand_over, rest};
pub use self::parts::{Parts, SlotPlan, absolute, check_paths};
pub use self::predecessor::Predecessor;
