-- Renews the leases of all of a worker's running sessions at once, and is the judge of who has lost one.
-- KEYS  1 deadlines zset, then for each session: session hash, log stream
-- ARGV  1 worker, 2 lease in ms, then for each session: id, epoch, log entries that its writer knows to be stored
-- gives for each session 1 (still its owner), 2 (its owner, but the log has lost entries), 0 (another epoch or worker, or ended)
--       or -1 (lost: there is nothing, or what stood there before it was claimed)
-- Atomic: between the look and the new deadline nobody may recover the session. Idempotent.
local lease_until = now_ms() + ARGV[2]
local verdicts = {}
for i = 1, (#KEYS - 1) / 2 do
  local session, log = KEYS[2 * i], KEYS[2 * i + 1]
  local id, epoch, count = ARGV[3 * i], ARGV[3 * i + 1], tonumber(ARGV[3 * i + 2])
  local s = redis.call('HMGET', session, 'state', 'epoch', 'worker')
  if not s[1] or not ENDED[s[1]] and tonumber(s[2]) < tonumber(epoch) then
    verdicts[i] = -1
  elseif s[1] == 'running' and s[2] == epoch and s[3] == ARGV[1] then
    redis.call('ZADD', KEYS[1], lease_until, id)
    verdicts[i] = redis.call('XLEN', log) < count and 2 or 1
  else
    verdicts[i] = 0
  end
end
return verdicts
