//! The journeys, each through the real daemons.

mod bad_input;
mod faults;
mod home;
mod membership;
mod real_engine;
mod streams;
