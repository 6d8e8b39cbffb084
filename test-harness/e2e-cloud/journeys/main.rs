//! The journeys, each through the real daemons.

mod attacks;
mod bad_input;
mod callers;
mod clients;
mod continuation;
mod cuts;
mod decisions;
mod dialects;
mod engines;
mod faults;
mod field;
mod first_steps;
mod gateway;
mod gpus;
mod holders;
mod home;
mod membership;
mod memory;
mod openai;
mod real_engine;
mod replays;
mod security;
mod steering;
mod streams;
mod trace;
mod waiting;
