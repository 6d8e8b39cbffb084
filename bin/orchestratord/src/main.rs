//! `orchestratord`: the control plane. Reads its configuration whole, then hands over.

mod api;
mod app;
mod config;
mod metrics;
mod services;
mod token;

use std::process::ExitCode;

fn main() -> ExitCode {
    let config = match config::read() {
        config::Read::Run(config) => config,
        config::Read::Exit(code) => return code,
    };
    let logs = daemon_kit::telemetry::init(config.log_format, &config.log);
    daemon_kit::serve::block_on(logs, app::bootstrap::run(*config))
}
