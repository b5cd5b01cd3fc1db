-- Every ending: the log's last event, the state, the answer and the callback that is now owed, in one step.
-- KEYS  1 session hash, 2 log stream, 3 content hash, 4 deadlines zset, 5 origins zset, 6 owed zset
-- ARGV  1 id, 2 epoch (0: a pending session that nobody came for, or that was stopped), 3 seq of the ending, 4 entries that the log
--       must have before it, 5 answer, 6 seconds to keep what is owed, 7 ms until the callback is due,
--       8..11 the ending: state, entry name, entry value, outcome; 12..15 the same for 'cancelled',
--       16 prefix of the subjects' zsets of pending sessions (same slot)
-- gives {'ended', ending id, state} | {'missing'} | {'fenced'} | {'short'}
-- Atomic: an ending without its callback is a workflow that hangs, a callback without its ending may be sent twice. The
-- ending comes last: while the log is not as long as its writer knows it, nothing is written ('short'). A session that somebody
-- has stopped ends as cancelled, whatever else it came to. Idempotent by epoch.
local s = redis.call('HMGET', KEYS[1], 'state', 'epoch', 'ending_id', 'cancel', 'origin', 'pending')
local state, epoch = s[1], s[2]
if not state then
  redis.call('ZREM', KEYS[4], ARGV[1])
  return { 'missing' }
end
if not ENDED[state] and tonumber(epoch) < tonumber(ARGV[2]) then
  return { 'missing' }
end
if epoch ~= ARGV[2] then
  return { 'fenced' }
end
if ENDED[state] then
  return { 'ended', s[3], state }
end
local now = now_ms()
local ending_id
if state == 'pending' then
  local deadline = redis.call('ZSCORE', KEYS[4], ARGV[1])
  if deadline and tonumber(deadline) > now then
    return { 'fenced' }
  end
  ending_id = '1-0'
else
  local last = redis.call('XREVRANGE', KEYS[2], '+', '-', 'COUNT', 1)
  local last_id = last[1] and last[1][1] or ''
  if last_id ~= epoch .. '-' .. (tonumber(ARGV[3]) - 1) or redis.call('XLEN', KEYS[2]) ~= tonumber(ARGV[4]) then
    return { 'short' }
  end
  ending_id = epoch .. '-' .. ARGV[3]
end
local as = s[4] and 12 or 8
redis.call('XADD', KEYS[2], ending_id, ARGV[as + 1], ARGV[as + 2])
redis.call('HSET', KEYS[1], 'state', ARGV[as], 'ending_id', ending_id, 'ended_at', now, 'outcome', ARGV[as + 3],
  'callback', 'owed', 'attempt', 0)
redis.call('HSET', KEYS[3], 'answer', ARGV[5])
if s[6] and state == 'pending' then
  redis.call('ZREM', ARGV[16] .. s[6], ARGV[1])
end
redis.call('ZREM', KEYS[4], ARGV[1])
owe(KEYS[5], s[5], ARGV[1], now + ARGV[7])
redis.call('ZADD', KEYS[6], now, ARGV[1])
for i = 1, 3 do
  redis.call('EXPIRE', KEYS[i], ARGV[6])
end
return { 'ended', ending_id, ARGV[as] }
