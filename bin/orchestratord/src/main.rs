//! `orchestratord`: the control plane. Reads its configuration whole, then hands over.

mod api;
mod app;
mod config;
mod metrics;
mod services;
mod token;

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let config = match daemon_kit::settings::read::<config::Settings>() {
        Ok(config) => config,
        Err(code) => return code,
    };
    let logs = daemon_kit::telemetry::init(config.shared.log_format, &config.shared.log);
    daemon_kit::serve::block_on(logs, app::bootstrap::run(config))
}
