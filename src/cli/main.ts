/** The program: arguments in, exit code out. Nothing is decided here. */
import { runProgram } from './program.ts'

process.exitCode = await runProgram(process.argv.slice(2))
