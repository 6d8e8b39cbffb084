//! The journeys, each through the real daemons.

mod bad_input;
mod continuation;
mod dialects;
mod engines;
mod faults;
mod gpus;
mod home;
mod membership;
mod real_engine;
mod steering;
mod streams;
