//! A channel whose other side is an attacker: who writes any word, at any moment, between any two looks of ours. What
//! must hold is that no call panics, reaches outside of its channel, or takes for ever.

mod faults;
mod looks;
mod region;
mod scribbler;
